"""One process of a comparison: a run, its fine-tunings, or the check before the first run.

    python -m slope.compare.worker run CONFIG.yaml
    python -m slope.compare.worker finetune CONFIG.yaml
    python -m slope.compare.worker check CONFIG.yaml ...

What is to be fine-tuned lies beside the configuration (:func:`.plan.fine_tunings_file`). The parent
holds the other end of standard input: when that closes, the parent has died, and the run saves and
ends as if it had been told to; fine-tuning has saved the seeds that it finished. Exit codes: 0 all
was done or the run has diverged, 1 it failed, 130 it was stopped and goes on from its checkpoint
next time.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf

from slope.compare.plan import OUTCOME, fine_tunings_file
from slope.finetune import Settings

STOPPED = 130
_EXPECTED = (ValueError, RuntimeError, OSError)  # their text says what to do
_LOCK = ".lock"
_PATIENCE = 120.0  # seconds: a process of a comparison that was killed may still be saving


def main(arguments: Sequence[str]) -> int:
    """Do what the module's text says; the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job, *files = arguments
    if job == "check":
        return _check(files)
    return _do(Path(files[0]), _train if job == "run" else _finetune)


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _do(file: Path, job: Callable[[Path, DictConfig], int]) -> int:
    import torch

    from slope.training.loop import DivergedError

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cfg = OmegaConf.load(file)
    assert isinstance(cfg, DictConfig)
    log_dir = Path(cfg.paths.log_dir)
    if int(os.environ.get("LOCAL_RANK", 0)):  # a further device of the run, started by the first
        return job(file, cfg)
    with FileLock(log_dir / _LOCK, timeout=_PATIENCE):
        (log_dir / OUTCOME).unlink(missing_ok=True)
        try:
            return job(file, cfg)
        except DivergedError as error:
            _write_outcome(log_dir, status="diverged", message=str(error), step=error.step)
            return 0
        except Exception as error:
            traceback.print_exc()
            _write_outcome(log_dir, status="failed", message=_line(error))
            return 1


def _train(file: Path, cfg: DictConfig) -> int:
    from slope.training import run

    return STOPPED if run(cfg).get("interrupted") else 0


def _finetune(file: Path, cfg: DictConfig) -> int:
    from slope.finetune import finetune

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    for chosen in _fine_tunings(file):
        finetune(chosen)
    return 0


def _fine_tunings(config_file: Path) -> list[Settings]:
    file = fine_tunings_file(config_file)
    entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [Settings(**entry) for entry in entries]


def _check(files: Sequence[str]) -> int:
    """Find what is wrong with any method, tokenize, and print JSON: an error or the machine."""
    from slope import finetune
    from slope.data import prepare
    from slope.training.program import check

    accelerator, wrong = "cpu", {}
    try:
        for file in files:
            cfg = OmegaConf.load(file)
            assert isinstance(cfg, DictConfig)
            try:
                accelerator = check(cfg).accelerator
            except _EXPECTED as error:
                wrong.setdefault(str(error), []).append(Path(file).stem.rpartition("-seed")[0])
        if wrong:
            found = (f"method {' and '.join(map(repr, who))}: {e}" for e, who in wrong.items())
            raise ValueError(" ".join(found))
        for chosen in _fine_tunings(Path(files[0])):  # all methods have the same
            try:
                finetune.check(chosen)
            except _EXPECTED as error:
                raise ValueError(
                    f"fine-tuning on {chosen.task}: {error} Its data and settings are in "
                    "compare.finetune; ~compare.finetune leaves fine-tuning out."
                ) from error
        # The first of the runs would count the tokenizer's memory as its own.
        prepare(OmegaConf.load(files[0]).datamodule)
    except Exception as error:
        if not isinstance(error, _EXPECTED):
            traceback.print_exc()
        print(json.dumps({"error": _line(error)}))
        return 1
    print(json.dumps({"accelerator": accelerator, "machine": _machine(accelerator)}))
    return 0


def _line(error: Exception) -> str:
    known = isinstance(error, _EXPECTED) and str(error)
    return " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())


def _machine(accelerator: str) -> dict[str, Any]:
    import pytorch_lightning
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if accelerator == "gpu" else None,
    }


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _write_outcome(log_dir: Path, **outcome: Any) -> None:
    temporary = log_dir / f"{OUTCOME}.partial"
    temporary.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, log_dir / OUTCOME)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
