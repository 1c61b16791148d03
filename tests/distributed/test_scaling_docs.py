"""What docs/scaling.md prints is what the script makes."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tables_of_the_docs_are_what_the_script_prints():
    script = runpy.run_path(str(ROOT / "scripts" / "scaling.py"))
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert "\n".join(script["tables"]()).strip() in text
