"""``slope estimate``: what a run needs and how fast it will be, without a GPU."""

from __future__ import annotations

ABOUT = "memory, speed and fit of a run, before it starts and without a GPU"


def run(arguments: list[str]) -> int:
    """Parse, estimate, print; the exit code."""
    from slope.estimate.command import run as estimate

    return estimate(arguments)
