"""Use what was trained: open any checkpoint, prune a dense one, generate text."""

from slope.deploy.generate import Generated, Sampling, generate
from slope.deploy.prune import prune, prune_by_zeros
from slope.deploy.source import Source, open_source

__all__ = [
    "Generated",
    "Sampling",
    "Source",
    "generate",
    "open_source",
    "prune",
    "prune_by_zeros",
]
