"""Measured choices that outlive the process: which path, which algorithm, for which product.

One small JSON file per choice, written under another name and renamed, so that several processes
may write at once: they have measured the same thing and the last one stays. A file that cannot be
read counts as absent. Nothing here knows what is chosen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

VERSION = 12


def default_folder() -> Path:
    """``$SLOPE_TUNING_DIR``, else ``slope/tuning`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    named = os.environ.get("SLOPE_TUNING_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slope" / "tuning"


class ChoiceStore:
    """Choices on disk.

    Args:
        folder: where; None takes :func:`default_folder`. It is made when the first choice is kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_folder() if folder is None else folder
        self._told = False

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file of a key."""
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"

    def load(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The choice kept for ``key``, or None."""
        path = self.path(key)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] == VERSION and content["key"] == dict(key):
                choice: dict[str, Any] = content["choice"]
                return choice
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._tell(f"cannot read {path} ({type(error).__name__}); it is measured again")
        return None

    def save(self, key: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        """Keep a choice; a disk that cannot be written costs a measurement next time, no more."""
        path = self.path(key)
        content = {"version": VERSION, "key": dict(key), "choice": dict(choice)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=self.folder, suffix=".partial")
            try:
                with os.fdopen(number, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1, sort_keys=True)
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._tell(f"cannot keep measurements in {self.folder} ({error.strerror})")

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            log.warning("%s.", what)
