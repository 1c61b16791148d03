"""Imports run one way, and ``import slope`` stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import slope

PACKAGE = Path(slope.__file__).parent
# A module may import modules of its own rank or lower. Whatever is not named is the application.
RANKS = {
    "adapters": 0, "config": 0, "pattern": 0, "spelling": 0,
    "masks": 1, "selection": 1,
    "compressed": 2,
    "backends": 3,
    "functional": 4,
    "linear": 5,
    "methods": 6,
    "layers": 7,
    "sparsity": 8,
    "convert": 9, "fusion": 9,
    "diagnostics": 10,
    "schedule": 11,
    "integrations": 12,
    "cli": 14,
}  # fmt: skip
APPLICATION = 13
ALONE = {"adapters": {"torch"}, "config": {"torch", "slope.pattern"}}
LIGHT = (
    "pattern", "masks", "compressed", "functional", "linear", "layers", "sparsity", "convert",
    "fusion", "schedule",
)  # fmt: skip


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    """The first name under ``slope``: ``backends/dense.py`` belongs to ``backends``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path, only_at_import: bool = False) -> set[str]:
    """Absolute dotted names of what a file imports, at any depth or only outside functions."""
    package = ["slope", *path.relative_to(PACKAGE).parts[:-1]]
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names} if stem == "slope" else {stem}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    own = part_of(path)
    own_rank = RANKS.get(own, APPLICATION)
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] != "slope" or len(parts) < 2 or parts[1] == own:
            continue
        if not ((PACKAGE / f"{parts[1]}.py").exists() or (PACKAGE / parts[1]).is_dir()):
            # A name re-exported by the package itself: only the application may go that way.
            assert own_rank >= APPLICATION - 1, f"{own} imports {name} through the package root"
            continue
        rank = RANKS.get(parts[1], APPLICATION)
        assert rank <= own_rank, f"{own} (rank {own_rank}) imports {name} (rank {rank})"


@pytest.mark.parametrize("name", ALONE)
def test_adapters_and_config_stand_alone(name):
    for imported in imported_names(PACKAGE / f"{name}.py"):
        allowed = imported in ALONE[name] or imported.split(".")[0] in sys.stdlib_module_names
        assert allowed, f"{name}.py imports {imported}"


@pytest.mark.parametrize(
    "path",
    [*(PACKAGE / f"{name}.py" for name in LIGHT), *sorted((PACKAGE / "methods").glob("*.py"))],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_importing_the_core_needs_only_torch(path):
    allowed = {"torch", "slope", *sys.stdlib_module_names}
    names = imported_names(path, only_at_import=True)
    assert {imported.split(".")[0] for imported in names} <= allowed


def test_import_slope_loads_nothing_but_torch_and_itself():
    program = (
        "import sys, json, torch; before = set(sys.modules); import slope;"
        "print(json.dumps({'new': sorted(set(sys.modules) - before),"
        " 'cuda': torch.cuda.is_initialized()}))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True, text=True, timeout=600, check=True,
        cwd=PACKAGE.parent,
    )  # fmt: skip
    loaded = json.loads(run.stdout)
    assert not loaded["cuda"]
    allowed = {"slope", "torch", *sys.stdlib_module_names}
    foreign = sorted({name.split(".")[0] for name in loaded["new"]} - allowed)
    assert not foreign, f"import slope pulls in {foreign}"
    heavy = ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "torch.testing",
             "slope.data", "slope.models", "slope.training", "slope.cli",
             "slope.integrations.lightning", "slope.plotting")  # fmt: skip
    slow = [name for name in loaded["new"] if name.startswith(heavy)]
    assert not slow, f"import slope pulls in {slow}"
