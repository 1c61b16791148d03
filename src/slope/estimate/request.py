"""What an estimate is asked for: the words of the command line, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slope import configs
from slope.estimate.rates import Rates, rates_of

STRATEGIES = ("ddp", "fsdp", "zero1")
PRECISIONS = ("bf16", "bf16-mixed", "fp16")
MOMENTS = ("bf16", "fp32")
KEYS = (
    "model", "experiment", "gpu", "pattern", "batch", "seq", "devices", "strategy", "precision",
    "rank", "accumulate", "layers", "moments",
)  # fmt: skip
# Token count of the measured rates: what a model gets where neither batch nor recipe says more.
_DEFAULT_SEQ, _DEFAULT_BATCH = 2048, 8


@dataclass(frozen=True)
class Request:
    """A run to estimate.

    Attributes:
        title: what the user called the model.
        cfg: the composed configuration, its pruner a sparse one.
        rates: of the GPU.
        batch: sequences per micro-batch and device.
        seq: tokens per sequence; None for 2048, or as many as the model has positions.
        devices: GPUs.
        strategy: ``ddp``, ``fsdp`` or ``zero1``; without meaning on one device.
        precision: one of ``PRECISIONS``.
        accumulate: micro-batches per optimizer step.
        layers: blocks of a shortened model, or None for the whole one.
        moments: dtype of Adam's moments, or None for that of the parameters, as torch has it.
    """

    title: str
    cfg: Any
    rates: Rates
    batch: int
    seq: int | None
    devices: int
    strategy: str
    precision: str
    accumulate: int
    layers: int | None
    moments: str | None

    def sequence(self, positions: int) -> int:
        """Tokens per sequence, for a model of so many positions.

        Raises:
            ValueError: if the model has fewer positions.
        """
        seq = min(_DEFAULT_SEQ, positions) if self.seq is None else self.seq
        if seq > positions:
            raise ValueError(
                f"seq={seq} is longer than the {positions} positions of {self.title}; type "
                f"seq={positions}."
            )
        return seq


def parse(words: Sequence[str]) -> Request:
    """Read ``key=value`` words; a key with a dot is an override as for ``slope train``.

    Raises:
        ValueError: for an unknown key, model, GPU or value.
    """
    given: dict[str, str] = {}
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        if "." in key and equals:
            overrides.append(word)
        elif key not in KEYS or not equals:
            raise ValueError(_unknown(word, key, bool(equals)))
        else:
            given[key] = value
    rates = rates_of(given.get("gpu", "h200"))
    from_recipe = "experiment" in given
    title, groups = _what(given)
    cfg = configs.compose([*groups, "pruner=slope", *_pruning(given), *overrides])
    devices = _count(given, "devices") or 1
    batch = _count(given, "batch")
    if batch is None:
        batch = int(cfg.datamodule.batch_size) if from_recipe else _DEFAULT_BATCH
    seq = _count(given, "seq")
    if seq is None and from_recipe:
        seq = int(cfg.datamodule.max_length)
    accumulate = _count(given, "accumulate")
    if accumulate is None:
        per_step = int(cfg.train.global_batch_size) if from_recipe else batch * devices
        accumulate = max(1, per_step // (batch * devices))
    moments = _choice("moments", given["moments"], MOMENTS) if "moments" in given else None
    precision = _choice("precision", given.get("precision", "bf16-mixed"), PRECISIONS)
    if moments == "bf16" and precision != "bf16":
        raise ValueError(
            f"moments=bf16 goes with precision=bf16: with {precision} the parameters are fp32, and "
            "torch's AdamW keeps its moments in their dtype. Leave moments= out."
        )
    return Request(
        title=title,
        cfg=cfg,
        rates=rates,
        batch=batch,
        seq=seq,
        devices=devices,
        strategy=_choice("strategy", given.get("strategy", "ddp"), STRATEGIES),
        precision=precision,
        accumulate=accumulate,
        layers=_count(given, "layers"),
        moments=moments,
    )


def find_model(name: str) -> str:
    """A model's full name from a short one: ``llama3-8b`` is ``llama3/8b``.

    Raises:
        ValueError: if none has that name, or several could be meant.
    """
    known = configs.choices("model")
    if name in known:
        return name
    found = [choice for choice in known if _squeeze(choice) == _squeeze(name)]
    if len(found) == 1:
        return found[0]
    near = configs.nearest(name.replace("-", "/", 1), known)
    raise ValueError(
        f"model={name!r} is unknown; did you mean model={near.replace('/', '-')}? Models: "
        f"{', '.join(choice.replace('/', '-') for choice in known)}."
    )


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())


def _what(given: dict[str, str]) -> tuple[str, list[str]]:
    if "model" in given and "experiment" in given:
        raise ValueError(
            f"model={given['model']} and experiment={given['experiment']} both name a model; give "
            "one of them."
        )
    if "experiment" in given:
        return given["experiment"], [f"experiment={given['experiment']}"]
    if "model" not in given:
        raise ValueError(
            "nothing to estimate; add model=llama3-8b or experiment=owt/gpt2s. Models: "
            f"{', '.join(name.replace('/', '-') for name in configs.choices('model'))}."
        )
    name = find_model(given["model"])
    return name, [f"model={name}"]


def _pruning(given: dict[str, str]) -> list[str]:
    from slope.pattern import NMPattern

    overrides = []
    if "pattern" in given:
        overrides.append(f'pruner.pattern="{NMPattern.parse(given["pattern"])}"')
    if "rank" in given:
        rank = _number(given["rank"])
        if rank == 0:
            overrides.append("pruner.add_lora=False")
        elif rank < 1:
            overrides.append(f"pruner.lora_rank={rank}")
        elif rank == int(rank):
            overrides.append(f"pruner.lora_rank={int(rank)}")
        else:
            raise ValueError(_rank_text(given["rank"]))
    return overrides


def _rank_text(value: str) -> str:
    return (
        f"rank={value} must be 0 (no adapters), a whole number, or a ratio of d_in between 0 and "
        "1, for example rank=16 or rank=0.0156."
    )


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(_rank_text(text)) from error
    if not 0 <= value < float("inf"):
        raise ValueError(_rank_text(text))
    return value


def _count(given: dict[str, str], key: str) -> int | None:
    """The whole number given for a key, None if it is not given."""
    if key not in given:
        return None
    text = given[key]
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{key}={text} must be a whole number of at least 1, for example {key}=8.")
    return int(text)


def _choice(key: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(
            f"{key}={value!r} is unknown; did you mean {key}={configs.nearest(value, known)}? "
            f"Choices: {', '.join(known)}."
        )
    return value


def _unknown(word: str, key: str, has_value: bool) -> str:
    near = configs.nearest(key, KEYS)
    if not has_value:
        return (
            f"{word!r} is not of the form key=value; write for example model=llama3-8b gpu=h200. "
            f"Keys: {', '.join(KEYS)}."
        )
    return f"{word!r}: unknown key {key!r}; did you mean {near}=? Keys: {', '.join(KEYS)}."
