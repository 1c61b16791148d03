"""Options that several sub-commands share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

PRECISIONS = ("bf16-mixed", "bf16")
COMPILER_HELP = "backend of torch.compile; default: inductor, on a CPU aot_eager"


def add_choice(parser: argparse.ArgumentParser) -> None:
    """Options that choose models."""
    parser.add_argument("--models", metavar="NAME,…", help="configurations, for example llama3-8b")
    parser.add_argument("--layers", metavar="N,…", help="blocks of the shortened models")


def add_training(parser: argparse.ArgumentParser) -> None:
    """Options of a training step."""
    parser.add_argument("--batch", type=positive, help="sequences")
    parser.add_argument("--seq", type=positive, help="tokens per sequence")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default=PRECISIONS[0],
        help="bf16-mixed: autocast over fp32 weights; bf16: everything in bf16",
    )  # fmt: skip


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def counts(text: str | None, default: Sequence[int], what: str) -> tuple[int, ...]:
    """Comma-separated positive whole numbers, or the default.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return tuple(default)
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--{what} {text} must be positive whole numbers, for example --{what} 1,4."
        )
    return tuple(int(part) for part in parts)


def ratios(text: str | None, default: Sequence[float]) -> tuple[float, ...]:
    """Comma-separated ratios in [0, 1), or the default.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return tuple(default)
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (-1.0,)
    if not all(0 <= ratio < 1 for ratio in found):
        raise ValueError(
            f"--ranks {text} must be ratios of d_in from 0 up to 1, for example --ranks 0,0.0156."
        )
    return found
