"""The folders of a run: whose they are, where it goes on from, and who trains it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from slope.disk import lock
from slope.training import checkpoint as checkpoints
from slope.training.metrics import clearly
from slope.training.summary import write_text


def start_from(
    cfg: DictConfig, log_dir: Path, directory: Path, first: bool
) -> checkpoints.Found | None:
    """The checkpoint to go on from; None for a run that starts at step 0."""
    step = None if int(cfg.resume_iter) < 0 else int(cfg.resume_iter)
    if not cfg.resume:
        if step is not None:
            raise ValueError(f"resume_iter={step} needs resume=True.")
        files = _files_of_run(log_dir, directory)
        if first and files:
            unsaved = (directory / checkpoints.UNSAVED).exists()
            if unsaved or checkpoints.saved(directory):
                choices = "type resume=True to go on with it, or another name= for a new run."
            else:
                choices = "its checkpoints are gone, so type another name=, or move it away."
            raise ValueError(f"run {cfg.name!r} exists already ({files[0]}); {choices}")
        return None
    found = checkpoints.find(directory, step)
    if found is not None:
        return found
    files = _files_of_run(log_dir, directory)
    if first and files and not (directory / checkpoints.UNSAVED).exists():
        raise ValueError(
            f"resume=True, but {directory} holds no checkpoint while other files of run "
            f"{cfg.name!r} exist ({', '.join(str(path) for path in files[:3])}); put its "
            "checkpoint back, or choose another name= for a new run."
        )
    return None


def _files_of_run(log_dir: Path, directory: Path) -> list[Path]:
    inside = sorted(directory.iterdir()) if directory.is_dir() else []
    logs = [log_dir / name for name in ("metrics.csv", "summary.json")]
    return inside + [path for path in logs if path.exists()]


def claim(cfg: DictConfig, log_dir: Path, directory: Path, found: checkpoints.Found | None) -> None:
    """Make the folder of a run's checkpoints and write down its configuration."""
    checkpoints.claim(directory, fresh=found is None)
    write_text(log_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def release(log_dir: Path, directory: Path) -> None:
    """Give the name of a run back that failed before its first step, if nothing was measured."""
    metrics = log_dir / "metrics.csv"
    if len(metrics.read_text(encoding="utf-8").splitlines()) > 1 or checkpoints.saved(directory):
        return
    for path in (metrics, log_dir / "diagnostics.csv", directory / checkpoints.UNSAVED):
        path.unlink(missing_ok=True)
    (directory / "tokenizer.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another's file is in it
        directory.rmdir()


@contextlib.contextmanager
def held(cfg: DictConfig, log_dir: Path) -> Iterator[None]:
    """Keep a second process from training the same run, as when a job is started twice."""
    path = log_dir / "lock"
    with clearly(path):
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            lock(file)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"run {cfg.name!r} is being trained by {file.read() or 'another process'}; wait "
                "for it, end it, or choose another name=."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
