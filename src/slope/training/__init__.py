"""The training program: ``run(cfg)`` does a whole run and returns its summary."""

from __future__ import annotations

from typing import Any


def run(cfg: Any) -> dict[str, Any]:
    """Pretrain a model as a configuration says; see :func:`slope.training.program.run`."""
    # Lightning and transformers are imported only when a run begins.
    from slope.training.program import run as run_program

    return run_program(cfg)
