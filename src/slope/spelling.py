"""The known name that a wrong one was meant for; standard library only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LEAST = 0.55  # likeness; less is no help to a reader


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name most like ``word``, or None if none is like it.

    Dotted names and names of files are compared as a whole and part by part, since the part that
    is typed alone is often right; a name that begins like the other counts as like it.

    Example:
        >>> nearest("lr", ["seed", "train.optimizer.lr", "pruner.lora_lr"])
        'train.optimizer.lr'
        >>> nearest("foo", ["seed", "train.optimizer.lr"])
    """

    def likeness(name: str) -> tuple[float, float]:
        whole = _likeness(word, name)
        parts = max(_likeness(_parts(word)[-1], part) for part in _parts(name))
        return max(whole, 0.9 * parts), whole

    ranked = [(likeness(name), name) for name in sorted(known)]
    best, name = max(ranked, key=lambda pair: pair[0], default=((0.0, 0.0), ""))
    return name if best[0] >= _LEAST else None


def did_you_mean(word: str, known: Iterable[str], form: str = "{!r}") -> str:
    """The end of a sentence about a wrong name: a question where a name is near, else a full stop.

    Args:
        word: what was given.
        known: what would have been right.
        form: how the name is written in the question.

    Example:
        >>> "unknown command 'trian'" + did_you_mean("trian", ["train", "plot"])
        "unknown command 'trian'; did you mean 'train'?"
        >>> "unknown command 'foo'" + did_you_mean("foo", ["train", "plot"])
        "unknown command 'foo'."
    """
    near = nearest(word, known)
    return "." if near is None else f"; did you mean {form.format(near)}?"


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


def _likeness(a: str, b: str) -> float:
    a, b = a.lower(), b.lower()
    short, long = sorted((a, b), key=len)
    ratio = difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
    return max(0.7, ratio) if len(short) > 2 and long.startswith(short) else ratio
