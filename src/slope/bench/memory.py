"""``slope bench memory``: bytes of training and serving, beside the arithmetic and the paper."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import slope
from slope.bench import models
from slope.bench.experiment import Experiment, Lab
from slope.bench.models import RANKS, ModelCase, TrainingStep
from slope.bench.options import add_choice, add_training, ratios
from slope.bench.results import Row, number
from slope.bench.timing import noting

if TYPE_CHECKING:
    from slope.estimate.paper import Published

TRAINING, INFERENCE = "training", "inference"
_DENSE = "dense"
_OTHER_DEPTH = 4  # of models that are not in the paper


@dataclass(frozen=True)
class MemoryCase(ModelCase):
    """A shortened model that trains or serves."""

    phase: str


class MemoryBench(Experiment):
    """Bytes held and bytes at the peak, dense and sparse, each model alone on the device."""

    name = "memory"
    about = "sparse / dense memory of training and inference: measured, by arithmetic, in the paper"
    case = MemoryCase
    columns = (
        "contender", "rank_ratio", "state_bytes", "peak_bytes", "state_ratio", "peak_ratio",
        "estimated_state_ratio", "estimated_peak_ratio", "paper_ratio",
    )  # fmt: skip
    index = ("model", "layers", "phase")
    kinds = ("model", "phase", "contender")
    note = (
        "Sparse / dense. Held: parameters, buffers, gradients and moments at the end of a step; "
        "peak: the allocator's, on a GPU only; in brackets by arithmetic (slope estimate). The "
        "paper prunes and counts otherwise, see docs/bench.md."
    )
    ylabel = "sparse / dense bytes"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        options.batch = options.batch or 1
        self.ranks = ratios(options.ranks, RANKS)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Models, depth, batch, precision, ranks."""
        add_choice(parser)
        add_training(parser)
        parser.add_argument("--ranks", metavar="R,…", help="of adapters, as ratios of d_in")

    def cases(self) -> Sequence[MemoryCase]:
        """Training and inference of every model, at the paper's depths if none are given."""
        if self.options.layers:
            chosen = models.model_cases(self.options, self.on_gpu)
            both = (TRAINING, INFERENCE)
            return [MemoryCase(case.model, case.layers, phase) for case in chosen for phase in both]
        cases = []
        for name in models.model_names(self.options.models, self.on_gpu, self.options.quick):
            row, other = _published(name), min(_OTHER_DEPTH, models.whole_depth(name))
            cases.append(MemoryCase(name, row.blocks_training if row else other, TRAINING))
            cases.append(MemoryCase(name, row.blocks_inference if row else other, INFERENCE))
        return cases

    def measure(self, case: MemoryCase, lab: Lab) -> Iterator[Row]:
        """Dense first, then sparse, each freed before the next."""
        dense: Row = {}
        for rank in (None, *((0.0,) if case.phase == TRAINING else self.ranks)):
            failed: dict[str, str] = {}
            name = _DENSE if rank is None else f"slope r={100 * rank:.4g}%"
            row: Row = {"contender": name, "rank_ratio": rank}
            if rank is not None:
                row |= self._expected(case, rank)
            with noting(failed, name):
                row |= self._bytes(case, rank, lab.device)
            lab.clock.free()
            if rank is None:
                dense = row
            else:
                for key in ("state", "peak"):
                    if row.get(f"{key}_bytes") and dense.get(f"{key}_bytes"):
                        row[f"{key}_ratio"] = row[f"{key}_bytes"] / dense[f"{key}_bytes"]
            yield row | {"failed": failed.get(name)}

    def _bytes(self, case: MemoryCase, rank: float | None, device: torch.device) -> Row:
        training = case.phase == TRAINING
        mixed = training and self.options.precision == "bf16-mixed"
        dtype = torch.float32 if mixed else torch.bfloat16
        config = None if rank is None else slope.SparsityConfig(adapter_rank=rank)
        batch, length = models.batch_of(case, self.options, self.on_gpu)
        before = models.allocated(device)
        model = models.build(case, length, device, dtype, config)
        tokens = models.random_tokens(model, batch, length, device)
        held: list[int] = []
        if training:
            step = TrainingStep(model, self.options.precision, tokens)
            step.optimizer.register_step_post_hook(lambda *_: held.append(_held(model, step)))
            step.call(model)  # makes the moments
            peak = models.peak_of(lambda: step.call(model), device)
        else:
            model.eval().requires_grad_(False)
            forward = torch.inference_mode()(
                lambda: model(input_ids=tokens, use_cache=False, logits_to_keep=1)
            )
            forward()
            held.append(_held(model))  # with what a layer keeps for serving
            peak = models.peak_of(forward, device)
        return {"state_bytes": held[-1], "peak_bytes": peak - before if peak else None}

    def _expected(self, case: MemoryCase, rank: float) -> Row:
        training, row = case.phase == TRAINING, _published(case.model)
        precision = self.options.precision if training else "bf16"
        batch, length = models.batch_of(case, self.options, self.on_gpu)
        told = models.arithmetic(case, precision, batch, length, rank)
        if training:
            own, base = told.sparse.training, told.dense.training
            return {
                "estimated_state_ratio": own.state / base.state,
                "estimated_peak_ratio": own.total / base.total,
                "paper_ratio": row and row.training,
            }
        served = told.sparse.serving.weights + told.sparse.serving.adapters
        return {
            "estimated_state_ratio": served / told.dense.serving.weights,
            "paper_ratio": row.inference[RANKS.index(rank)] if row and rank in RANKS else None,
        }

    def cell(self, row: Row) -> str:
        """Bytes of the dense model; ratios of the sparse ones."""
        if row["contender"] == _DENSE:
            return f"{number(row['state_bytes'] / 1e9, 3)} GB held"
        parts = []
        for key, word in (("state", "held"), ("peak", "peak")):
            if row.get(f"{key}_ratio"):
                told = number(row.get(f"estimated_{key}_ratio"), 3)
                parts.append(f"{word} {number(row[f'{key}_ratio'], 3)} ({told})")
        return ", ".join([*parts, f"paper {number(row.get('paper_ratio'))}"])

    def point(self, row: Row) -> tuple[str, str, Any, float | None]:
        """Ratio of what is held over models."""
        return row["phase"], row["contender"], row["model"], row.get("state_ratio")


def _published(model: str) -> Published | None:
    """The paper's row of a model, or None."""
    from slope.estimate.paper import PUBLISHED
    from slope.estimate.request import find_model

    name = model if model == models.TOY else find_model(model)
    return next((row for row in PUBLISHED if row.model == name), None)


def _held(model: nn.Module, step: TrainingStep | None = None) -> int:
    """Bytes of the storages of parameters, buffers, gradients and optimizer state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for state in step.optimizer.state.values() if step else ():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
