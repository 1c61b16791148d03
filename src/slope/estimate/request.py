"""What an estimate is asked for: the words of the command line, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slope import configs
from slope.estimate.rates import Rates, rates_of
from slope.spelling import did_you_mean


@dataclass(frozen=True)
class Precision:
    """Bytes per number.

    Attributes:
        parameter: of weights, biases, values and adapters.
        gradient: of ``.grad``.
        moments: of Adam's two moments together; torch keeps them in the dtype of the parameter.
        residual: of the stream between the blocks.
    """

    parameter: int
    gradient: int
    moments: int
    residual: int

    @property
    def mixed(self) -> bool:
        """Whether products cast their operands: autocast over fp32 parameters."""
        return self.parameter == 4


PRECISIONS = {"bf16-mixed": Precision(4, 4, 8, 4), "bf16": Precision(2, 2, 4, 2)}
STRATEGIES = ("ddp", "zero1", "fsdp2", "hsdp")
HOST = 8  # devices of one host
KEYS = (
    "model", "experiment", "gpu", "pattern", "rank", "batch", "seq", "accumulate", "devices",
    "strategy", "precision",
)  # fmt: skip
# The settings of a run that an estimate reads beside its own keys.
_OVERRIDES = ("model.", "pruner.", "datamodule.tokenizer=")
# What a model gets where no recipe says more: the token count of the measured rates.
_SEQ, _BATCH = 2048, 8


@dataclass(frozen=True)
class Request:
    """A run to estimate.

    Attributes:
        title: the model or recipe.
        cfg: the composed configuration, its pruner a sparse one.
        rates: of the GPU.
        batch: sequences per micro-batch and device.
        seq: tokens per sequence.
        accumulate: micro-batches per optimizer step.
        devices: GPUs.
        strategy: one of ``STRATEGIES``; without meaning on one device.
        precision: one of ``PRECISIONS``.
    """

    title: str
    cfg: Any
    rates: Rates
    batch: int
    seq: int
    accumulate: int
    devices: int
    strategy: str
    precision: str

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one device."""
        return self.batch * self.seq

    @property
    def sizes(self) -> Precision:
        """Bytes per number."""
        return PRECISIONS[self.precision]

    @property
    def state_shares(self) -> int:
        """Devices that share out parameters and gradients."""
        return {"fsdp2": self.devices, "hsdp": HOST}.get(self.strategy, 1)

    @property
    def moment_shares(self) -> int:
        """Devices that share out the optimizer's moments."""
        return self.devices if self.strategy == "zero1" else self.state_shares

    @property
    def sharded(self) -> bool:
        """Whether parameters are shared out."""
        return self.devices > 1 and self.strategy in ("fsdp2", "hsdp")

    @property
    def hosts(self) -> int:
        """Hosts of ``HOST`` devices."""
        return -(-self.devices // HOST)


def parse(words: Sequence[str]) -> Request:
    """Read ``key=value`` words; a key with a dot is an override as for ``slope train``.

    Raises:
        ValueError: for an unknown key, model, GPU or value.
    """
    given: dict[str, str] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith(_OVERRIDES):
            overrides.append(word)
        elif key not in KEYS or not equals:
            raise ValueError(_unknown(word, key))
        else:
            given[key] = value
    title, what = _what(given)
    cfg = configs.compose([what, "pruner=slope", *_pruning(given), *overrides])
    recipe = "experiment" in given
    config = cfg.model.config
    positions = int(config.get("n_positions") or config.max_position_embeddings)
    usual = int(cfg.datamodule.max_length) if recipe else min(_SEQ, positions)
    seq = _count(given, "seq", usual)
    if seq > positions:
        raise ValueError(
            f"seq={seq} is longer than the {positions} positions of {title}; type seq={positions}."
        )
    batch = _count(given, "batch", int(cfg.datamodule.batch_size) if recipe else _BATCH)
    devices = _count(given, "devices", 1)
    strategy = _choice("strategy", given.get("strategy", "ddp"), STRATEGIES)
    if strategy == "hsdp" and (devices % HOST or devices == HOST):
        raise ValueError(
            f"strategy=hsdp with devices={devices}: it repeats the model on each host of {HOST} "
            f"devices; type devices={max(2, round(devices / HOST)) * HOST}, or strategy=fsdp2."
        )
    together = 1
    if recipe and "accumulate" not in given:
        whole = int(cfg.train.global_batch_size)
        together, rest = divmod(whole, batch * devices)
        if rest:
            raise ValueError(
                f"the recipe's train.global_batch_size={whole} is no multiple of batch={batch} x "
                f"devices={devices} = {batch * devices}; choose others, or type accumulate=1."
            )
    return Request(
        title=title,
        cfg=cfg,
        rates=rates_of(given.get("gpu", "h200")),
        batch=batch,
        seq=seq,
        accumulate=_count(given, "accumulate", together),
        devices=devices,
        strategy=strategy,
        precision=_choice("precision", given.get("precision", "bf16-mixed"), tuple(PRECISIONS)),
    )


def find_model(name: str) -> str:
    """A model's full name from a short one: ``llama3-8b`` is ``llama3/8b``.

    Raises:
        ValueError: if none has that name.
    """
    known = {re.sub(r"[^a-z0-9.]", "", choice): choice for choice in configs.choices("model")}
    found = known.get(re.sub(r"[^a-z0-9.]", "", name.lower()))
    if found is not None:
        return found
    near = did_you_mean(name, [choice.replace("/", "-") for choice in known.values()], "model={}")
    raise ValueError(f"model={name!r} is unknown{near} Models: {models()}.")


def models() -> str:
    """The models there are, in short form."""
    return ", ".join(choice.replace("/", "-") for choice in configs.choices("model"))


def _what(given: dict[str, str]) -> tuple[str, str]:
    """Title, and the override that chooses the model or the recipe."""
    if "model" in given and "experiment" in given:
        raise ValueError(
            f"model={given['model']} and experiment={given['experiment']} both name a model; give "
            "one of them."
        )
    if "experiment" in given:
        return given["experiment"], f"experiment={given['experiment']}"
    if "model" not in given:
        raise ValueError(
            f"nothing to estimate; add model=llama3-8b or experiment=owt/gpt2s. Models: {models()}."
        )
    name = find_model(given["model"])
    return name, f"model={name}"


def _pruning(given: dict[str, str]) -> list[str]:
    overrides = [f"pruner.pattern={given['pattern']}"] if "pattern" in given else []
    if "rank" in given:
        none = re.fullmatch(r"0+(\.0*)?", given["rank"])
        overrides.append("pruner.add_lora=False" if none else f"pruner.lora_rank={given['rank']}")
    return overrides


def _count(given: dict[str, str], key: str, usual: int) -> int:
    text = given.get(key, str(usual))
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{key}={text} must be a whole number of at least 1, for example {key}=8.")
    return int(text)


def _choice(key: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(
            f"{key}={value!r} is unknown{did_you_mean(value, known, key + '={}')} "
            f"Choices: {', '.join(known)}."
        )
    return value


def _unknown(word: str, key: str) -> str:
    if "=" not in word:
        return (
            f"{word!r} is not of the form key=value; write for example model=llama3-8b gpu=h200. "
            f"Keys: {', '.join(KEYS)}."
        )
    near = did_you_mean(key, KEYS, "{}=")
    return (
        f"{word!r}: unknown key {key!r}{near} Keys: {', '.join(KEYS)}, and what "
        "`slope train` has under model. and pruner."
    )
