"""What happens between two optimizer steps: log, validate, evaluate, save, stop.

All of it happens in one place, in this order, so a checkpoint of step k holds everything that step
k brought about, and a process killed anywhere continues from the last one as if nothing had been.
"""

from __future__ import annotations

import logging
import math
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from slope import adapters_active
from slope.training import checkpoint as checkpoints
from slope.training import rng
from slope.training.diagnostics import MaskDiagnostics
from slope.training.evaluation import TextEvaluation
from slope.training.metrics import MetricsFile, Value
from slope.training.module import LanguageModule
from slope.training.progress import Progress

log = logging.getLogger(__name__)

SMOOTHED_STEPS = 50
"""Optimizer steps whose mean loss is the run's ``train_loss``."""


class DivergedError(RuntimeError):
    """The loss or the gradient of an optimizer step is no number.

    Attributes:
        step: that step, counted from 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Intervals:
    """When things happen, in optimizer steps; 0 means never."""

    max_steps: int
    log: int
    validate: int
    save: int
    progress: int
    keep_best: int

    def due(self, every: int, step: int) -> bool:
        """Whether an interval ends at ``step``; the last step ends all of them."""
        return step == self.max_steps or (every > 0 and step % every == 0)


@dataclass
class RunState:
    """What a run knows beside weights, optimizer and counters; saved in every checkpoint.

    Attributes:
        seconds: wall time from the first step on, over all restarts.
        training_seconds: the part of it spent neither in validation nor in saving.
        recent: losses of the last optimizer steps.
        val_loss: last measured validation loss.
        val_step: the step it was measured at.
        validated: what else was measured with it, by column.
        evaluated: the last measurements of other texts, by column.
        best: validation loss of each step_<k>.ckpt, as pairs (step, loss).
        copies: names under which the checkpoint of this state is also written.
        dropped: steps whose step_<k>.ckpt goes once it is written.
        adapters_started_at_step: first optimizer step done with active adapters.
    """

    seconds: float = 0.0
    training_seconds: float = 0.0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=SMOOTHED_STEPS))
    val_loss: float | None = None
    val_step: int | None = None
    validated: dict[str, float] = field(default_factory=dict)
    evaluated: dict[str, float] = field(default_factory=dict)
    best: list[tuple[int, float]] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    adapters_started_at_step: int | None = None

    def train_loss(self) -> float | None:
        """Mean loss of the last steps."""
        return math.fsum(self.recent) / len(self.recent) if self.recent else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "seconds": self.seconds,
            "training_seconds": self.training_seconds,
            "recent": list(self.recent),
            "val_loss": self.val_loss,
            "val_step": self.val_step,
            "validated": dict(self.validated),
            "evaluated": dict(self.evaluated),
            "best": [list(pair) for pair in self.best],
            "copies": list(self.copies),
            "dropped": list(self.dropped),
            "adapters_started_at_step": self.adapters_started_at_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the values of a checkpoint."""
        self.seconds = state["seconds"]
        self.training_seconds = state["training_seconds"]
        self.recent.extend(state["recent"])
        self.val_loss = state["val_loss"]
        self.val_step = state["val_step"]
        # Older versions have neither.
        self.validated = dict(state.get("validated", {}))
        self.evaluated = dict(state.get("evaluated", {}))
        self.best = [(int(step), float(loss)) for step, loss in state["best"]]
        self.copies, self.dropped = list(state["copies"]), list(state["dropped"])
        self.adapters_started_at_step = state["adapters_started_at_step"]


class RunLoop(pl.Callback):
    """Log, validate, evaluate, save and stop at optimizer step boundaries.

    Args:
        intervals: when.
        directory: of the checkpoints.
        files: writes them.
        progress: the bar or the log lines, on the first process only.
        validation: makes the validation batches of this process.
        signature: what a checkpoint must agree with to be resumed.
        tokens_per_step: tokens of an optimizer step over all processes.
        tokens_per_epoch: tokens of the training split.
        seed: of the generators of a new run; each process adds its rank.
        rng_states: generator states of a checkpoint, one per process.
        tokenizer: that of the data, in plain values; saved for whoever uses the model.
        evaluation: of other texts, on every process; None if there is none.

    Attributes:
        metrics: the CSV, on the first process only; set before the fit.
        diagnostics: of the masks, likewise; None also where nothing is to be measured.
        state: what is saved in every checkpoint.
        stopped_by: the signal that ended the run early.
    """

    def __init__(
        self,
        intervals: Intervals,
        directory: Path,
        files: checkpoints.VerifiedCheckpointIO,
        progress: Progress | None,
        validation: Callable[[], Iterable[dict[str, Tensor]]],
        signature: dict[str, Any],
        tokens_per_step: int,
        tokens_per_epoch: int,
        seed: int,
        rng_states: list[dict[str, Any]] | None = None,
        tokenizer: dict[str, Any] | None = None,
        evaluation: TextEvaluation | None = None,
    ) -> None:
        self.intervals = intervals
        self.directory = directory
        self.files = files
        self.metrics: MetricsFile | None = None
        self.diagnostics: MaskDiagnostics | None = None
        self.progress = progress
        self.validation = validation
        self.signature = signature
        self.tokens_per_step = tokens_per_step
        self.tokens_per_epoch = tokens_per_epoch
        self.seed = seed
        self.rng_states = rng_states
        self.tokenizer = tokenizer
        self.evaluation = evaluation
        self.state = RunState()
        self.stopped_by: str | None = None
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._fresh = True
        self._row_step = 0
        self._row_time = 0.0
        self._clock = 0.0
        self._handlers: dict[int, Any] = {}

    # -- what Lightning calls ----------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModule) -> None:
        """Take over the signals and start the clock."""
        self._catch_signals()
        self._row_step = trainer.global_step
        self._clock = self._row_time = time.monotonic()
        if self.progress is not None:
            self.progress.start(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: LanguageModule, batch: Any, batch_idx: int
    ) -> None:
        """Put generators and learning rates into the state of this step."""
        if self._fresh:
            self._fresh = False
            self._start_generators(trainer.global_rank)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        pl_module.rates.apply(trainer.optimizers[0], step)
        if self.state.adapters_started_at_step is None and adapters_active(pl_module.model):
            self.state.adapters_started_at_step = step
            log.info("adapters start at step %d of %d.", step, self.intervals.max_steps)
        if self.diagnostics is not None and self.diagnostics.due(step + 1):
            with self._aside():
                self.diagnostics.begin(pl_module.model)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: LanguageModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After the last micro-batch of an optimizer step, do what is due."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, due = trainer.global_step, self.intervals.due
        assert pl_module.grad_norm is not None
        self._pending.append((step, torch.stack(pl_module.losses).mean(), pl_module.grad_norm))
        pl_module.losses.clear()
        if self.progress is not None:
            self.progress.step(step)

        stop = self._stop_requested(trainer)
        validate = due(self.intervals.validate, step)
        evaluate = self.evaluation is not None and due(self.evaluation.every, step)
        save = stop or due(self.intervals.save, step)
        progress = self.intervals.progress > 0 and step % self.intervals.progress == 0
        row: dict[str, Value] = {}
        write = validate or evaluate or step == 1 or due(self.intervals.log, step)
        if write or save or progress:
            row = self._measure(trainer, pl_module, step)
        if self.diagnostics is not None and self.diagnostics.due(step):
            with self._aside():
                row |= self.diagnostics.measure(pl_module.model, step)
        if validate:
            with self._aside():
                measured = self._validate(trainer, pl_module)
            loss = measured.pop("val/loss")
            self.state.val_loss, self.state.val_step = loss, step
            self.state.validated = measured
            row |= {"val/loss": loss, "val/perplexity": perplexity(loss), **measured}
        if evaluate:
            assert self.evaluation is not None
            with self._aside():
                self.state.evaluated = self.evaluation.measure(trainer, pl_module)
            row |= self.state.evaluated
        if write:
            self._write(trainer, row)
        if save or progress:
            with self._aside():
                self._save(trainer, step, validate, progress)
        if stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: LanguageModule) -> None:
        """Wait for the last checkpoint, give the signals back and stop the clock."""
        self._require_saved(trainer)
        self.files.close()
        self.state.seconds += time.monotonic() - self._clock
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: LanguageModule, exception: BaseException
    ) -> None:
        """Give the signals and the terminal back; let a checkpoint that is begun be finished."""
        self._close()
        self.files.close(wait=not isinstance(exception, KeyboardInterrupt))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: LanguageModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not know of; every process takes part."""
        states = [rng.capture()]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, states[0])
            states = gathered
        checkpoint["slope"] = {
            "signature": self.signature,
            "state": self.state.state_dict(),
            "rng": states,
            "seed": self.seed,
            "tokenizer": self.tokenizer,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: LanguageModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take back what :meth:`on_save_checkpoint` stored."""
        self.state.load_state_dict(checkpoint["slope"]["state"])
        self.rng_states = checkpoint["slope"]["rng"]

    # -- the parts ---------------------------------------------------------------------------------

    def _start_generators(self, rank: int) -> None:
        if self.rng_states is not None and rank < len(self.rng_states):
            rng.restore(self.rng_states[rank])
        else:
            rng.seed_all(self.seed + rank)
        self.rng_states = None

    def _measure(
        self, trainer: pl.Trainer, pl_module: LanguageModule, step: int
    ) -> dict[str, Value]:
        """Read the losses since the last call: the only place where the device is waited for."""
        loss, norm = self._flush(trainer)
        now = time.monotonic()
        speed = None
        if now > self._row_time and step > self._row_step:
            speed = (step - self._row_step) * self.tokens_per_step / (now - self._row_time)
            self.state.training_seconds += now - self._row_time
        self._row_step, self._row_time = step, now
        self.state.seconds += now - self._clock
        self._clock = now
        tokens = step * self.tokens_per_step
        rates = pl_module.rates
        row: dict[str, Value] = {
            "step": step,
            "tokens": tokens,
            "epoch": tokens / self.tokens_per_epoch,
            "seconds": self.state.seconds,
            "train/loss": loss,
            "train/perplexity": perplexity(loss),
            "lr": rates.model(step - 1),
            "lora_lr": None if rates.lora_start_step is None else rates.adapters(step - 1),
            "grad_norm": norm,
            "tokens_per_second": speed,
            "peak_memory_bytes": peak_memory_bytes(),
            "adapters_active": int(adapters_active(pl_module.model)),
        }
        if self.progress is not None:
            self.progress.measured(row)
        return row

    def _flush(self, trainer: pl.Trainer) -> tuple[float, float]:
        losses = torch.stack([loss.float() for _, loss, _ in self._pending])
        norms = torch.stack([norm.float() for _, _, norm in self._pending])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(losses)
            losses = losses / trainer.world_size
        steps = [step for step, _, _ in self._pending]
        self._pending.clear()
        values = torch.stack((losses, norms)).tolist()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        for step, loss, norm in zip(steps, *values, strict=True):
            # A loss scaler makes infinite gradients by design and skips the step.
            if not math.isfinite(loss) or not (scaled or math.isfinite(norm)):
                raise DivergedError(self._diverged(step, loss, norm), step)
        self.state.recent.extend(values[0])
        return values[0][-1], values[1][-1]

    def _diverged(self, step: int, loss: float, norm: float) -> str:
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        good = checkpoints.saved(self.directory)
        kept = f"the last good checkpoint is {good[0]}" if good else "no checkpoint was due yet"
        return (
            f"{what} at step {step}; training stops, {kept}. Try a lower train.optimizer.lr, a "
            "longer train.scheduler.warmup_steps or trainer.precision=32-true, and go on with "
            "resume=True (resume_iter=<k> goes further back)."
        )

    @torch.no_grad()
    def _validate(self, trainer: pl.Trainer, pl_module: LanguageModule) -> dict[str, float]:
        """Means over the validation split and all processes, the loss per predicted token."""
        measures = len(pl_module.MEASURES)
        sums = torch.zeros(measures, 2, dtype=torch.float64, device=pl_module.device)
        pl_module.eval()
        try:
            with rng.untouched(), trainer.precision_plugin.forward_context():
                for batch in self.validation():
                    batch = {name: tensor.to(pl_module.device) for name, tensor in batch.items()}
                    weight = batch.pop("weight", 1)
                    for place, (mean, count) in enumerate(pl_module.evaluate(batch)):
                        sums[place, 0] += mean.double() * count * weight
                        sums[place, 1] += count * weight
        finally:
            pl_module.train()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        means = (sums[:, 0] / sums[:, 1]).tolist()
        return dict(zip(pl_module.MEASURES, means, strict=True))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """What is done in here is no part of the training speed."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else the wait for the step before it would count as this
        started = time.monotonic()
        yield
        self._row_time += time.monotonic() - started

    def _write(self, trainer: pl.Trainer, row: dict[str, Value]) -> None:
        if self.metrics is not None:
            self.metrics.append(row)
        if self.progress is not None:
            self.progress.row(row)
        measured = {name: value for name, value in row.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=int(row["step"] or 0))

    def _save(self, trainer: pl.Trainer, step: int, validated: bool, progress: bool) -> None:
        """Write last.ckpt first, so that it is never older than the copies."""
        for file in (self.metrics, self.diagnostics):
            if file is not None:
                file.sync()
        self.state.dropped = []
        copies: list[str] = []
        if validated and self.intervals.keep_best > 0:
            assert self.state.val_loss is not None
            others = [pair for pair in self.state.best if pair[0] != step]
            ranked = sorted([*others, (step, self.state.val_loss)], key=lambda pair: pair[1])
            self.state.best = ranked[: self.intervals.keep_best]
            self.state.dropped = [old for old, _ in ranked[self.intervals.keep_best :]]
            if step not in self.state.dropped:
                copies.append(f"step_{step}.ckpt")
        if progress:
            copies.append(f"progress_step_{step}.ckpt")
        self.state.copies = copies
        self._require_saved(trainer)  # the one before, if it is still being written
        after = checkpoints.After(
            tuple(self.directory / name for name in copies),
            tuple(self.directory / f"step_{old}.ckpt" for old in self.state.dropped),
        )
        path = self.directory / checkpoints.LAST
        trainer.save_checkpoint(path, weights_only=False, storage_options=after)
        if not self.files.asynchronous:
            self._require_saved(trainer)

    def _require_saved(self, trainer: pl.Trainer, wait: bool = True) -> None:
        """Stop all processes where one could not write a checkpoint."""
        failures = [self.files.failure(wait)]
        if trainer.world_size > 1:
            failures = [None] * trainer.world_size
            torch.distributed.all_gather_object(failures, self.files.failure(wait))
        for failure in failures:
            if failure is not None:
                raise RuntimeError(failure)

    # -- stopping ----------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stopped_by is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped_by = signal.Signals(number).name
        sys.stderr.write(
            f"\n{self.stopped_by}: finishing this optimizer step and saving; "
            "Ctrl-C again stops at once.\n"
        )

    def _stop_requested(self, trainer: pl.Trainer) -> bool:
        """Whether a process got a signal.

        Raises:
            RuntimeError: on every process, if one could not write a checkpoint in the background.
        """
        stop = self.stopped_by is not None
        failed = self.files.failure() is not None
        if trainer.world_size > 1:
            # One exchange about both; which of them it was is asked afterwards.
            stop = failed = trainer.strategy.reduce_boolean_decision(stop or failed, all=False)
        if failed:
            self._require_saved(trainer, wait=False)
        if stop and self.stopped_by is None:
            self.stopped_by = "a signal to another process"
        return stop

    def _close(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self.progress is not None:
            self.progress.stop()


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU if it uses one, else resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
