"""Share of a training step that the program adds to the model's own work, on the CPU.

    python benchmarks/program_overhead.py --output benchmarks/results/<date>_<name>

Runs the demo's experiment for some steps with clocks around the forward, the backward, clipping and
the optimizer. What is left of the wall time between the first and the last timed step is the
loader, Lightning, the callbacks, metrics and progress. Validation and checkpoints are off.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import slope.training
from slope import configs
from slope.training.loop import RunLoop
from slope.training.module import LanguageModule

WARMUP = 10


class Clock:
    """Exclusive time inside wrapped functions: time of a wrapped function inside counts once."""

    def __init__(self) -> None:
        self.inside = 0.0
        self.depth = 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self.depth = time.perf_counter(), self.depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.inside += time.perf_counter() - start

        return timed


class TimedAdamW(torch.optim.AdamW):
    """AdamW whose closure, which holds all of Lightning's work, is not part of its own time."""

    clock: Clock

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure first, as AdamW does, then time the update alone."""
        loss = closure() if closure is not None else None
        self.clock.wrap(super().step)()
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    options = parser.parse_args()
    clock, marks = Clock(), []

    TimedAdamW.clock = clock
    torch.optim.AdamW = TimedAdamW
    LanguageModule.training_step = clock.wrap(LanguageModule.training_step)
    LanguageModule.configure_gradient_clipping = clock.wrap(
        LanguageModule.configure_gradient_clipping
    )
    torch.Tensor.backward = clock.wrap(torch.Tensor.backward)
    at_end = RunLoop.on_train_batch_end

    def mark(loop: RunLoop, trainer: Any, *args: Any) -> None:
        at_end(loop, trainer, *args)
        marks.append((time.perf_counter(), clock.inside))

    RunLoop.on_train_batch_end = mark
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        never = 10 * options.steps
        settings = [
            "experiment=demo",
            "name=overhead",
            "plot=False",
            f"trainer.max_steps={options.steps}",
            f"trainer.val_check_interval={never}",
            f"callbacks.checkpoint.every_n_steps={never}",
        ]
        slope.training.run(configs.compose(settings + options.overrides))
        os.chdir("/")

    # The last step also validates and saves.
    (start, inside_start), (end, inside_end) = marks[WARMUP], marks[-2]
    steps = len(marks) - 2 - WARMUP
    wall, inside = end - start, inside_end - inside_start
    result = {
        "steps": steps,
        "milliseconds_per_step": 1e3 * wall / steps,
        "milliseconds_of_the_program": 1e3 * (wall - inside) / steps,
        "share_of_the_program": 1 - inside / wall,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "overrides": options.overrides,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
