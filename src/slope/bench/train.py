"""``slope bench train``: whole training steps of shortened models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import slope
from slope.bench import models
from slope.bench.experiment import TIMES, Experiment, Lab
from slope.bench.models import ModelCase, TrainingStep
from slope.bench.options import COMPILER_HELP, add_choice, add_training, positive
from slope.bench.results import Row, markdown, number
from slope.bench.timing import Call, Factory

CONTENDERS = ("dense", "dense + compile", "slope", "slope + compile")


class TrainBench(Experiment):
    """Forward, backward, clipping and fused AdamW, dense and sparse, eager and compiled."""

    name = "train"
    about = "whole training steps of shortened models: time, tokens/s, peak memory, MFU"
    case = ModelCase
    columns = (*TIMES, "tokens_per_s", "peak_bytes", "mfu")
    index = ("model", "layers")
    kinds = ("model", "layers", "contender")
    note = (
        "Each cell: median time, how many times as fast as the faster dense step (10th–90th "
        "percentile), tokens/s, MFU by the dense model's FLOPs, peak memory."
    )
    ylabel = "best dense time / time"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        names = options.contenders or ",".join(CONTENDERS)
        self.contenders = [name.strip() for name in names.split(",")]
        for name in self.contenders:
            if name not in CONTENDERS:
                known = ", ".join(CONTENDERS)
                raise ValueError(f"--contenders {name!r} is unknown; choose from {known}.")
        if "graph" in (options.modes or ()):
            raise ValueError("--modes graph: a training step is timed as it runs; leave it out.")
        options.modes = ("eager",)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Models, depth, batch, precision, contenders."""
        add_choice(parser)
        add_training(parser)
        parser.add_argument("--contenders", metavar="NAME,…", help=f"of {', '.join(CONTENDERS)}")
        parser.add_argument(
            "--column-mask-interval", type=positive, default=1, metavar="STEPS",
            help="optimizer steps between refreshes of the column masks",
        )  # fmt: skip
        parser.add_argument("--compiler", help=COMPILER_HELP)

    def cases(self) -> Sequence[ModelCase]:
        """Every model at every depth."""
        return models.model_cases(self.options, self.on_gpu)

    def measure(self, case: ModelCase, lab: Lab) -> Iterator[Row]:
        """All contenders in turns; speed-ups against the faster of the dense ones."""
        torch.compiler.reset()
        batch, length = models.batch_of(case, self.options, self.on_gpu)
        told = models.arithmetic(case, self.options.precision, batch, length, 0)
        limit = models.peak_flops(lab.device)
        peaks: dict[str, int] = {}
        for row in lab.compare(self._factories(case, lab.device, peaks), CONTENDERS[:2]):
            if "median_us" in row:
                speed = batch * length / row["median_us"] * 1e6
                row["tokens_per_s"] = speed
                row["mfu"] = speed * told.dense.flops.model / limit if limit else None
            yield row | {"peak_bytes": peaks.get(row["contender"]) or None}

    def _factories(
        self, case: ModelCase, device: torch.device, peaks: dict[str, int]
    ) -> dict[str, Factory]:
        """A step eager and compiled is one model with one optimizer state, to save memory."""
        options = self.options
        batch, length = models.batch_of(case, options, self.on_gpu)
        made: dict[bool, tuple[TrainingStep, int]] = {}

        def step_of(sparse: bool) -> tuple[TrainingStep, int]:
            if sparse not in made:
                before, interval = models.allocated(device), options.column_mask_interval
                config = slope.SparsityConfig(column_mask_interval=interval) if sparse else None
                dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
                model = models.build(case, length, device, dtype, config)
                tokens = models.random_tokens(model, batch, length, device)
                made[sparse] = TrainingStep(model, options.precision, tokens, interval), before
            return made[sparse]

        def prepare(name: str) -> Call:
            step, before = step_of(name.startswith("slope"))
            forward: Callable[..., Any] = step.model
            if name.endswith("compile"):
                compiler = models.compiler(options, self.on_gpu)
                forward = torch.compile(step.model, backend=compiler)

            def call() -> None:
                step.call(forward)

            try:
                call()  # compiles, and makes the optimizer's state
                peaks[name] = max(0, models.peak_of(call, device) - before)
            except torch.OutOfMemoryError:
                del made[name.startswith("slope")]  # the others may fit without it
                raise
            return call

        return {name: (lambda name=name: prepare(name)) for name in self.contenders}  # type: ignore[misc]

    def cell(self, row: Row) -> str:
        """Time, speed-up, tokens/s, MFU, memory."""
        text = f"{number(row['median_us'] / 1e3, 1)} ms"
        if row.get("speed_up") is not None:
            low, high = number(row["speed_up_low"]), number(row["speed_up_high"])
            text += f", {number(row['speed_up'])}× ({low}–{high})"
        text += f", {number(row['tokens_per_s'], 0)}/s"
        if row.get("mfu"):
            text += f", {number(100 * row['mfu'], 1)} %"
        return f"{text}, {number(row['peak_bytes'] / 1e9, 1)} GB" if row["peak_bytes"] else text

    def point(self, row: Row) -> tuple[str, str, Any, float | None]:
        """Speed-up over models and depths."""
        x = f"{row['model']}, {row['layers']} blocks"
        return "training step", row["contender"], x, row.get("speed_up")

    def table(self, rows: list[Row]) -> str:
        """What was measured, and what it says about the whole models."""
        body = []
        for model in dict.fromkeys(row["model"] for row in rows):
            times = {
                name: models.at_full_depth(
                    [r for r in rows if (r["model"], r["contender"]) == (model, name)], "median_us"
                )
                for name in CONTENDERS
            }
            best = min((time for name in CONTENDERS[:2] if (time := times[name])), default=None)
            cells = [
                f"{number(time / 1e3, 1)} ms, {number(best / time)}×" if time and best else "–"
                for time in times.values()
            ]
            if best:
                body.append([model, str(models.whole_depth(model)), *cells])
        text = super().table(rows)
        if body:
            text += "\nThe whole model, extrapolated from these depths (not measured):\n\n"
            text += markdown(["model", "blocks", *CONTENDERS], body)
        return text
