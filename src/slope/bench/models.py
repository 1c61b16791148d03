"""Models of our own configurations, shortened to a few blocks, for measuring.

A shortened model keeps embedding, head and the first QKV, all dense, so its speed-up is smaller
than the whole model's. Two depths give the cost of a further block, and with it the whole.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import slope
from slope.bench.experiment import Case
from slope.bench.options import counts
from slope.bench.results import Row
from slope.bench.timing import Call

if TYPE_CHECKING:
    from slope.estimate import Estimate

TOY = "toy"
_TOY = (
    "model=gpt2/small", "model.config.n_embd=64", "model.config.n_layer=4", "model.config.n_head=2",
    "model.config.n_positions=256",
)  # fmt: skip
PAPER = (
    "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "llama3-8b", "mistral-7b",
    "gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl",
)  # fmt: skip
QUICK = ("llama3-8b", "opt-6.7b", "gpt2-small")
# What a configuration leaves to the tokenizer; and no dropout, which only dilutes a comparison.
_BY_FAMILY = {
    "gpt2": ("vocab_size=50264", "resid_pdrop=0.0", "embd_pdrop=0.0", "attn_pdrop=0.0"),
    "opt": ("dropout=0.0",),
    "mistral": ("vocab_size=32768",),
}
RANKS = (0.0, 0.015625, 0.0625)  # of the adapters in the paper, as ratios of d_in


@dataclass(frozen=True)
class ModelCase(Case):
    """A model, shortened."""

    model: str
    layers: int


def model_names(text: str | None, on_gpu: bool, quick: bool) -> tuple[str, ...]:
    """The models asked for, or those of the paper; on a CPU a toy.

    Raises:
        ValueError: for a model that no configuration has.
    """
    if text is None:
        return (TOY,) if not on_gpu else QUICK if quick else PAPER
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        overrides(name)
    return names


def overrides(model: str, layers: int | None = None) -> list[str]:
    """What to type behind ``slope config`` for the model that is measured.

    Args:
        model: ``"toy"`` or a configuration's name, in long or short form.
        layers: blocks, None for all.

    Raises:
        ValueError: for an unknown model, one that is not causal, or more blocks than it has.
    """
    from slope import configs
    from slope.estimate.request import find_model

    words = list(_TOY) if model == TOY else [f"model={find_model(model)}"]
    cfg = configs.compose(words).model
    if cfg.family == "bert":
        raise ValueError(
            f"--models {model}: causal models are measured; choose another, or type "
            f"slope estimate model={find_model(model)} for what the arithmetic says."
        )
    words += [f"model.config.{setting}" for setting in _BY_FAMILY.get(cfg.family, ())]
    if model == TOY:
        words.append("model.config.vocab_size=512")
    if layers is not None:
        key = "n_layer" if "n_layer" in cfg.config else "num_hidden_layers"
        if layers > cfg.config[key]:
            raise ValueError(
                f"--layers {layers} is more than the {cfg.config[key]} blocks of {model}; type "
                f"--layers {cfg.config[key]} or less."
            )
        words.append(f"model.config.{key}={layers}")
    return words


def whole_depth(model: str) -> int:
    """Blocks of the whole model."""
    from slope import configs

    config = configs.compose(overrides(model)).model.config
    return int(config.get("n_layer") or config.num_hidden_layers)


def build(
    case: ModelCase,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    sparsity: slope.SparsityConfig | None = None,
) -> nn.Module:
    """A randomly initialised model, made on the device.

    Args:
        case: which.
        length: of the sequences that it will read.
        device: of the model.
        dtype: of its parameters.
        sparsity: None leaves it dense; adapters are active.

    Raises:
        ValueError: if the sequences are longer than the model allows.
    """
    from slope import configs
    from slope.models import attend_causally, build_model

    cfg = configs.compose(overrides(case.model, case.layers)).model
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(dtype):
        model = build_model(cfg, 1, length)
    model.to(device)  # buffers that transformers makes on the CPU
    if sparsity is not None:
        slope.sparsify(model, sparsity)
        slope.activate_adapters(model)
    attend_causally(model)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def blocks_of(model: nn.Module, layers: int) -> nn.ModuleList:
    """The blocks of a model, which has that many."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    (blocks,) = (one for one in lists if len(one) == layers)
    return blocks


def compiler(options: argparse.Namespace, on_gpu: bool) -> str:
    """Backend of torch.compile; a CPU need not have a C++ compiler."""
    return options.compiler or ("inductor" if on_gpu else "aot_eager")


def batch_of(case: ModelCase, options: argparse.Namespace, on_gpu: bool) -> tuple[int, int]:
    """Sequences and tokens per sequence: 8 x 2048 on a GPU; of a shorter model more sequences."""
    from slope import configs

    config = configs.compose(overrides(case.model)).model.config
    usual = 2048 if on_gpu else 32
    positions = config.get("n_positions") or config.max_position_embeddings
    length = options.seq or min(usual, positions)
    return options.batch or (8 if on_gpu else 2) * usual // length, length


def random_tokens(model: nn.Module, batch: int, length: int, device: torch.device) -> Tensor:
    """(B, L) int64."""
    config: Any = model.config
    return torch.randint(0, config.vocab_size, (batch, length), device=device)


def arithmetic(case: ModelCase, precision: str, batch: int, length: int, rank: float) -> Estimate:
    """What ``slope estimate`` says of the model that is measured.

    Args:
        case: which.
        precision: ``"bf16-mixed"`` or ``"bf16"``.
        batch: sequences.
        length: tokens per sequence.
        rank: of adapters, as a ratio of d_in, 0 for none.
    """
    from slope.estimate import estimate, parse

    words = overrides(case.model, case.layers)
    first = words.pop(0)
    request = [first, f"precision={precision}", f"batch={batch}", f"seq={length}", f"rank={rank}"]
    return estimate(parse([*request, *words]))


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s by the data sheet, None for a device that is not known."""
    from slope.estimate.rates import gpus, rates_of

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    found = [rates_of(key).gpu for key in gpus() if key.split("-")[0] in name]
    return found[0].dense_flops if found else None


class TrainingStep:
    """Forward, backward, clipping and fused AdamW of one micro-batch.

    Args:
        model: in training mode.
        precision: ``"bf16-mixed"``: autocast; ``"bf16"``: as the model is.
        tokens: (B, L) int64.
        interval: of the column masks, see :class:`slope.SparsityConfig`.
    """

    def __init__(self, model: nn.Module, precision: str, tokens: Tensor, interval: int = 1) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, weight_decay=0.1, fused=True
        )
        self._tokens = tokens
        self._autocast = precision == "bf16-mixed"
        # Interval 1 refreshes by itself.
        self._schedule = None
        if interval > 1 and any(True for _ in slope.sparse_layers(model)):
            self._schedule = slope.SlopeSchedule(10**9, lora_start=None)
        self._done = 0

    def call(self, forward: Callable[..., Any]) -> None:
        """One step; ``forward`` is the model or its compiled form."""
        if self._schedule is not None:
            self._schedule.apply(self.model, self._done)
        self._done += 1
        with torch.autocast(self._tokens.device.type, torch.bfloat16, enabled=self._autocast):
            loss = forward(input_ids=self._tokens, labels=self._tokens, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def at_full_depth(rows: Sequence[Row], key: str) -> float | None:
    """A quantity of the whole model from its values at two depths or more; None from fewer.

    Linear in the number of blocks, which are alike but for the first QKV, dense at every depth.

    Args:
        rows: of one model and contender, each with ``layers`` and ``key``.
        key: column.
    """
    points = sorted((row["layers"], row[key]) for row in rows if row.get(key) is not None)
    if len({layers for layers, _ in points}) < 2:
        return None
    (few, least), (many, most) = points[0], points[-1]
    per_block = (most - least) / (many - few)
    return float(least + per_block * (whole_depth(rows[0]["model"]) - few))


def model_cases(options: argparse.Namespace, on_gpu: bool) -> list[ModelCase]:
    """The models at the depths asked for.

    Raises:
        ValueError: for an unknown model or an impossible depth.
    """
    depths = counts(options.layers, (1, 3) if on_gpu and not options.quick else (2,), "layers")
    names = model_names(options.models, on_gpu, options.quick)
    for name in names:
        overrides(name, max(depths))
    return [ModelCase(name, depth) for name in names for depth in depths]


def allocated(device: torch.device) -> int:
    """Bytes of the device's tensors; 0 on a CPU, whose allocator does not count."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_of(call: Call, device: torch.device) -> int:
    """Most bytes allocated during a call; 0 on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return 0
