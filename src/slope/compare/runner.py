"""Runs of a comparison in processes of their own, several at once, with one progress bar."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from slope.compare.columns import task_scores
from slope.compare.plan import ENDED, Run, fine_tunings_file, read_outcome

log = logging.getLogger(__name__)

OUTPUT = "output.txt"
"""What a run's process has printed, in the run's folder."""

_POLL = 0.2  # seconds between looks at the workers
_LOOK = 5  # looks between readings of their metrics


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check(runs: Sequence[Run]) -> dict[str, Any]:
    """Check the configuration of every method in a process that has torch, and tokenize.

    Args:
        runs: the runs to come; one per method is looked at.

    Returns:
        ``accelerator`` ("cpu" or "gpu") and ``machine``, versions and hardware.

    Raises:
        ValueError: with what is wrong, and with which method.
        KeyboardInterrupt: if it was stopped by Ctrl-C.
    """
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.method, run)
        _write_settings(run)
    process = subprocess.Popen(
        _command("check", *(run.config_file for run in first.values())),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        process.wait()
    finally:
        process.kill()
        _hang_up(process)
    if process.returncode == 0:
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer
    if lines:
        raise ValueError(json.loads(lines[-1])["error"])
    raise RuntimeError(f"the process that checks the settings {_how_ended(process.returncode)}.")


class Runner:
    """Do runs, several at once; those that have ended are not repeated.

    Args:
        runs: all runs that are wanted.
        jobs: processes at once.
        threads: of each process.
        bar: draw a bar if standard error is a terminal.

    Attributes:
        failed: the runs that failed in this call, and why.
        handler: for log lines on standard error that leave the bar alone.
    """

    def __init__(self, runs: Sequence[Run], jobs: int, threads: int, bar: bool = True) -> None:
        console = Console(stderr=True)
        self.failed: dict[Run, str] = {}
        self.handler: logging.Handler = (
            RichHandler(console=console, show_path=False, show_level=False)
            if console.is_terminal
            else logging.StreamHandler()
        )
        self._jobs, self._threads = jobs, threads
        self._waiting = deque(run for run in runs if run.state() not in ENDED)
        self._count = len(runs)
        self._active: dict[Run, subprocess.Popen[bytes]] = {}
        self._interrupted: list[Run] = []
        self._signals = 0
        # Optimizer steps of the runs that have not ended: what the time left is reckoned from.
        self._left = {run: _steps_left(run) for run in self._waiting}
        self._to_do = sum(self._left.values())
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("comparing"),
            BarColumn(),
            TextColumn("{task.fields[ended]}/{task.fields[count]} runs  {task.fields[names]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (bar and console.is_terminal),
            speed_estimate_period=3600,
        )

    def run(self) -> bool:
        """Do the runs; False if a signal stopped them before all had ended."""
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handlers[number] = signal.signal(number, self._on_signal)
        try:
            with self._bar:
                self._task = self._bar.add_task(
                    "", total=self._to_do, ended=0, count=self._count, names=""
                )
                self._follow()
        finally:
            for process in self._active.values():
                process.kill()
                _hang_up(process)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return not (self._waiting or self._interrupted)

    def _follow(self) -> None:
        told, looks = 0, 0
        while self._active or (self._waiting and not self._signals):
            while self._waiting and not self._signals and len(self._active) < self._jobs:
                run = self._waiting.popleft()
                self._active[run] = _start(run, self._threads)
            time.sleep(_POLL)
            if self._signals > told:
                told = self._signals
                self._tell_to_stop(at_once=told > 1)
            for run, process in list(self._active.items()):
                if process.poll() is not None:
                    del self._active[run]
                    _hang_up(process)
                    self._ended(run, process.returncode)
            looks += 1
            if looks % _LOOK == 0:
                self._refresh()

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signals += 1

    def _tell_to_stop(self, at_once: bool) -> None:
        if not at_once:
            log.info(
                "stopping: %d runs finish their optimizer step and save; Ctrl-C again stops at "
                "once. The same command goes on.",
                len(self._active),
            )
        for process in self._active.values():
            if at_once:
                process.kill()
            else:
                process.terminate()

    def _ended(self, run: Run, code: int) -> None:
        if run.state() not in ENDED and self._signals:
            self._interrupted.append(run)
            return
        if code == 0 and run.trained and run.state() == "begun":
            # Fine-tuning is a process of its own, so that it begins as after a stop.
            self._waiting.appendleft(run)
            return
        self._left.pop(run)
        self._refresh()
        who = f"{self._count - len(self._left)}/{self._count} {run.name}"
        if run.state() in ENDED:
            log.info("%s: %s%s", who, _result(run), self._when())
        else:
            outcome = read_outcome(run.log_dir)
            reason = outcome["message"] if outcome else f"its process {_how_ended(code)}"
            self.failed[run] = reason
            log.error("%s failed: %s (%s)", who, reason, run.log_dir / OUTPUT)

    def _refresh(self) -> None:
        for run in self._active:
            self._left[run] = _steps_left(run)
        self._bar.update(
            self._task,
            completed=self._to_do - sum(self._left.values()),
            ended=self._count - len(self._left),
            names=", ".join(run.name for run in self._active),
        )

    def _when(self) -> str:
        left = sum(self._left.values())
        if not left:
            return ""
        seconds = (time.monotonic() - self._began) / (self._to_do - left) * left
        hours, rest = divmod(round(seconds), 3600)
        return f"; {hours}:{rest // 60:02}:{rest % 60:02} left"


def last_step(log_dir: Path) -> int:
    """The optimizer step of the last whole row of a run's metrics; 0 before the first."""
    try:
        with open(log_dir / "metrics.csv", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return 0
    rows = text[: text.rfind("\n") + 1].splitlines()
    step = rows[-1].partition(",")[0] if rows else ""
    return int(step) if step.isdigit() else 0


def _steps_left(run: Run) -> int:
    """Optimizer steps to come; each fine-tuning counts as a training."""
    return run.steps * (1 + len(run.left_to_tune())) - last_step(run.log_dir)


def _write_settings(run: Run) -> None:
    run.config_file.parent.mkdir(parents=True, exist_ok=True)
    run.config_file.write_text(OmegaConf.to_yaml(run.cfg), encoding="utf-8")
    file = fine_tunings_file(run.config_file)
    if run.fine_tunings:
        text = json.dumps([asdict(chosen) for chosen in run.fine_tunings], indent=1)
        file.write_text(text + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def _start(run: Run, threads: int) -> subprocess.Popen[bytes]:
    run.log_dir.mkdir(parents=True, exist_ok=True)
    _write_settings(run)
    one = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    with open(run.log_dir / OUTPUT, "ab") as output:
        # A session of its own: Ctrl-C in the terminal reaches the parent alone, which passes it on.
        return subprocess.Popen(
            _command("finetune" if run.trained else "run", run.config_file),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **one},
            start_new_session=True,
        )


def _command(job: str, *files: Path) -> list[str]:
    return [sys.executable, "-m", "slope.compare.worker", job, *map(str, files)]


def _hang_up(process: subprocess.Popen[Any]) -> None:
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _result(run: Run) -> str:
    outcome = read_outcome(run.log_dir)
    if outcome is not None:
        return f"diverged at step {outcome['step']}"
    summary = run.summary()
    text = f"val loss {summary['val_loss']:.4f} ({summary['wall_seconds']:.0f} s)"
    scores = task_scores(run.fine_tunings)
    return ", ".join([text, *(f"{task} {score:.2f}" for task, score in scores.items())])


def _how_ended(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"
