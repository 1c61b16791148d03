"""Keep line numbers in README.md and docs/ right: ``make docs``, or ``python docs/lines.py``.

A link like [`SlopeLinear.forward`](../src/slope/linear.py#L1) names a class, function or constant;
its line is looked up in the file's syntax tree. A test checks that nothing is out of date.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w./-]+\.py)#L(\d+)\)")


def documents() -> list[Path]:
    """The Markdown files of the repository."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def line_of(path: Path, symbol: str) -> int:
    """Line where ``symbol`` (``name`` or ``Class.name``) is defined in a Python file.

    Raises:
        LookupError: if it is not.
    """
    body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    line = 0
    for part in symbol.split("."):
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part:
                body, line = node.body, node.lineno
                break
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == part for target in targets):
                body, line = [], node.lineno
                break
        else:
            raise LookupError(f"{path.relative_to(ROOT)} defines no {symbol!r}")
    return line


def corrected(document: Path) -> str:
    """Text of a document with the line number of every link as it should be."""

    def link(match: re.Match[str]) -> str:
        line = line_of((document.parent / match[2]).resolve(), match[1])
        return f"[`{match[1]}`]({match[2]}#L{line})"

    return LINK.sub(link, document.read_text(encoding="utf-8"))


def main() -> int:
    """Rewrite what is out of date."""
    for document in documents():
        text = corrected(document)
        if text != document.read_text(encoding="utf-8"):
            document.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
