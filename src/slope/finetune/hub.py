"""Task sets of the Hugging Face hub, through ``datasets``."""

from __future__ import annotations

from typing import Any


def load_hub(path: str, name: str | None = None) -> Any:
    """All splits of a data set.

    Raises:
        RuntimeError: if the hub cannot be reached and no copy is on this machine.
    """
    import datasets

    try:
        return datasets.load_dataset(path, name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise RuntimeError(
            f"data set '{path}' cannot be had from the Hugging Face hub ({type(error).__name__}: "
            f"{reason}). Without the hub, type data=<folder of the official files>."
        ) from error
