"""From the ``model`` section of a configuration to a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from slope.spelling import did_you_mean

# family -> transformers class that builds it with its head
FAMILIES = {
    "gpt2": "AutoModelForCausalLM",
    "opt": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "mistral": "AutoModelForCausalLM",
    "qwen2": "AutoModelForCausalLM",
    "bert": "AutoModelForPreTraining",
}
_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")
_CAUSAL_SDPA = "sdpa_without_mask"
_COUNTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
# Tensor cores want the vocabulary's side of the head divisible by 8.
_VOCAB_MULTIPLE = 8


def build_model(
    cfg: Mapping[str, Any],
    vocab_size: int,
    max_length: int,
    *,
    eos_token_id: int | None = None,
) -> nn.Module:
    """A randomly initialised model; draws from torch's default generator.

    Args:
        cfg: ``family``, ``config`` (arguments of the family's transformers config; ``vocab_size``
            may be null) and ``attn_implementation``.
        vocab_size: of the data's tokenizer. With ``config.vocab_size`` null the model's is this,
            rounded up to a multiple of 8; the rows beyond it are never read.
        max_length: longest sequence of the data, in tokens.
        eos_token_id: end of text of the data's tokenizer, written into the model's config.

    Returns:
        The model with its language-model head, in fp32 (torch's default dtype), in training mode.
        Under ``torch.device("meta")`` nothing is allocated.

    Raises:
        ValueError: if the family or a config key is unknown, a size is below 1, or the data does
            not fit the model.
    """
    import transformers

    family = str(cfg["family"])
    if family not in FAMILIES:
        raise ValueError(
            f"model.family={family!r} is unknown; choose one of {', '.join(FAMILIES)}."
        )
    attention = str(cfg.get("attn_implementation") or "sdpa")
    if attention not in _ATTENTION:
        raise ValueError(
            f"model.attn_implementation={attention!r} is unknown; choose one of "
            f"{', '.join(_ATTENTION)}."
        )
    config_class = transformers.CONFIG_MAPPING[family]
    values = _plain(cfg.get("config") or {})
    _check_keys(config_class, values)
    _check_counts(config_class, values)
    values["vocab_size"] = _vocab_size(values.get("vocab_size"), vocab_size)
    # The families' defaults are ids of their released tokenizers; OPT would even freeze the
    # embedding of its pad_token_id.
    for key in ("bos_token_id", "eos_token_id"):
        values.setdefault(key, eos_token_id)
    if family != "bert":
        values.setdefault("pad_token_id", None)
    try:
        config = config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.config does not describe a {family} model: {error}") from error
    positions = config.max_position_embeddings
    if max_length > positions:
        raise ValueError(
            f"datamodule.max_length={max_length} is longer than the {positions} positions of the "
            f"{family} model; set datamodule.max_length={positions} or give the model more "
            f"positions (model.config.{_own_name(config_class, 'max_position_embeddings')}="
            f"{max_length})."
        )
    _check_heads(family, config)
    auto_class = getattr(transformers, FAMILIES[family])
    model = auto_class.from_config(
        config, attn_implementation=attention, dtype=torch.get_default_dtype()
    )
    if family != "bert" and getattr(model, "loss_type", "") is None:
        # transformers guesses the loss from the class's name and warns about GPT2LMHeadModel.
        model.loss_type = "ForCausalLM"
    return model.train()


def attend_causally(model: nn.Module) -> None:
    """Let SDPA mask by its own causal flag: for sequences without padding and without a cache.

    Under torch.compile transformers makes a mask for every causal model, and with a mask SDPA has
    to use a slower kernel. A model with another attention, with a sliding window, or one that is
    not causal stays as it is.
    """
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(model, PreTrainedModel) or model.config.model_type == "bert":
        return
    config = model.config
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if config._attn_implementation == "sdpa" and not window:
        AttentionInterface.register(_CAUSAL_SDPA, sdpa_attention_forward)
        model.set_attn_implementation(_CAUSAL_SDPA)


def _plain(values: Any) -> dict[str, Any]:
    """A dict of plain Python values from a mapping or an OmegaConf node."""
    if type(values) is not dict:
        from omegaconf import OmegaConf

        if OmegaConf.is_config(values):
            values = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    return dict(values)


def _check_keys(config_class: Any, values: Mapping[str, Any]) -> None:
    # transformers takes any keyword and stores what it does not know, so a typo would go unseen.
    default = config_class()
    known = {*vars(default), *default.attribute_map, "rope_parameters"}
    for key in values:
        if key not in known:
            names = sorted(name for name in known if not name.startswith("_"))
            near = did_you_mean(key, names, "model.config.{}")
            raise ValueError(f"model.config.{key} is no argument of {config_class.__name__}{near}")


def _check_counts(config_class: Any, values: Mapping[str, Any]) -> None:
    # transformers would build a model without blocks, or divide by the number of heads.
    for name in _COUNTS:
        for key in dict.fromkeys((name, _own_name(config_class, name))):
            if isinstance(count := values.get(key), int) and count < 1:
                raise ValueError(
                    f"model.config.{key}={count} must be at least 1; the default is "
                    f"model.config.{key}={getattr(config_class(), key)}."
                )


def _vocab_size(wanted: int | None, data: int) -> int:
    if wanted is None:
        return -(-data // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if data > wanted:
        raise ValueError(
            f"the tokenizer has {data} tokens and model.config.vocab_size={wanted}; leave it null "
            f"(model.config.vocab_size=null) or set at least {data}."
        )
    return int(wanted)


def _own_name(config_class: Any, name: str) -> str:
    return str(config_class.attribute_map.get(name, name))


def _check_heads(family: str, config: Any) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "head_dim", None) is None and width % heads:
        raise ValueError(
            f"the {family} model's width {width} is not divisible by its {heads} attention heads; "
            "change one of them in model.config."
        )
    shared = getattr(config, "num_key_value_heads", None)
    if shared and heads % shared:
        raise ValueError(
            f"{heads} attention heads cannot share {shared} key/value heads; set "
            "model.config.num_key_value_heads to a divisor of the number of heads."
        )
