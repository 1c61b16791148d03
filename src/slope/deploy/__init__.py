"""Use what was trained: open any checkpoint, prune a dense one, generate text."""

from slope.deploy.generate import Generated, Sampling, generate
from slope.deploy.prune import calibration_ids, prune, prune_by_zeros, read_calibration
from slope.deploy.source import Source, open_source

__all__ = [
    "Generated",
    "Sampling",
    "Source",
    "calibration_ids",
    "generate",
    "open_source",
    "prune",
    "prune_by_zeros",
    "read_calibration",
]
