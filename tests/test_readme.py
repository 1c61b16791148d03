"""What the documents say is true: code runs, commands compose, links lead somewhere."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LINES = runpy.run_path(str(ROOT / "docs" / "lines.py"), run_name="lines")
DOCUMENTS = LINES["documents"]()
TARGETS = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def named(paths):
    return {"argvalues": paths, "ids": lambda path: str(path.relative_to(ROOT))}


def blocks(document, language):
    return [code for kind, code in BLOCK.findall(document.read_text()) if kind == language]


def command_lines():
    """(document, words) of every command in a bash block, continuation lines joined."""
    for document in DOCUMENTS:
        for block in blocks(document, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=f"{document.name}: {' '.join(words)[:70]}")


def check_training(overrides):
    from slope import configs
    from slope.training.pruner import check_pruner

    check_pruner(configs.compose(overrides).pruner)


@pytest.mark.parametrize("words", list(command_lines()))
def test_every_command_line_is_right(words):
    program, *rest = words
    if program == "make":
        assert rest[0] in TARGETS
        assert all(re.match(r"(ARGS|NAME|PYTHON|TORCH)=", word) for word in rest[1:])
    elif words[:2] == ["python", "training/run.py"]:
        check_training(rest[1:])
    elif words[:2] in (["slope", "train"], ["slope", "config"]):
        check_training([word for word in rest[1:] if not word.startswith("--")])
    elif program in ("sbatch", "scripts/run_jobs_torchrun.sh"):
        script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
        assert (ROOT / words[script]).is_file()
        check_training(words[script + 1 :])
    elif words[:2] == ["slope", "compare"]:
        from slope import configs

        overrides = [word for word in rest[1:] if not word.startswith("--")]
        assert configs.compose(overrides).compare.methods
    elif words[:2] == ["slope", "finetune"]:
        from slope.finetune import settings

        settings(rest[1:])
    elif words[:2] == ["slope", "estimate"]:
        from slope.estimate import parse

        assert parse([word for word in rest[1:] if "=" in word]).title
    elif words[:2] == ["slope", "bench"]:
        from slope.cli import bench

        assert bench.prepared(rest[1:]).cases()
    elif program == "slope" and rest[0] in ("generate", "export", "eval"):
        import_module(f"slope.cli.{words[1]}").parse(rest[1:])
    elif program in ("python", "bash"):
        assert (ROOT / rest[0]).is_file()
    elif program == "torchrun":
        assert (ROOT / next(word for word in rest if word.endswith(".py"))).is_file()
    else:
        assert program == "slope" and rest[0] in ("plot", "report", "inspect", "completion"), (
            f"nobody checks {program!r}"
        )


@pytest.mark.parametrize("document", **named([d for d in DOCUMENTS if blocks(d, "python")]))
def test_python_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in blocks(document, "python"):
        exec(compile(code, str(document), "exec"), namespace)


def test_the_snippet_in_the_readme_does_what_its_comments_say(tmp_path, monkeypatch):
    import torch

    import slope

    monkeypatch.chdir(tmp_path)
    namespace = {}
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["schedule"].start_step == 18
    loaded = namespace["model"]
    assert slope.adapters_active(loaded)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert all(torch.isfinite(p).all() for p in loaded.parameters())


@pytest.mark.parametrize("document", **named(DOCUMENTS))
def test_links_lead_somewhere_and_line_numbers_are_right(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target
    assert LINES["corrected"](document) == text, "line numbers moved; type: make docs"


def test_a_link_to_a_name_that_is_gone_is_an_error():
    with pytest.raises(LookupError, match="defines no 'SlopeLinear.backwards'"):
        LINES["line_of"](ROOT / "src/slope/linear.py", "SlopeLinear.backwards")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_options_in_the_readme_exist():
    from omegaconf import OmegaConf

    from slope import configs

    cfg = configs.compose(["experiment=smoke"])
    table = (ROOT / "README.md").read_text().split("| option | meaning |")[1].split("\n\n")[0]
    names = [name for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row[:100])]
    pruner = set(cfg.pruner)
    checked = 0
    for name in names:
        if name in pruner or name.startswith("pruner."):
            assert (
                OmegaConf.select(cfg, f"pruner.{name.removeprefix('pruner.')}", default=...)
                is not ...
            )
            checked += 1
    assert checked >= 12


def test_the_citation_names_paper_and_licence():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert [a["family-names"] for a in paper["authors"]] == [
        "Mozaffari",
        "Yazdanbakhsh",
        "Zhang",
        "Mehri Dehnavi",
    ]
    assert "2405.16325" in paper["url"]


def test_versions_agree():
    import slope

    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{slope.__version__}"' in project
    assert f"version: {slope.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{slope.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_what_make_installs_is_pinned_to_versions_that_the_project_allows():
    found = importlib.metadata.metadata("slope-llm").get_all("Requires-Dist")
    needed = [Requirement(line) for line in found]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {pin.name: pin for pin in map(Requirement, (x for x in lines if x[0] != "#"))}
    assert {need.name for need in needed} - {"torch", "slope-llm"} == set(pins)
    for need in needed:
        if need.name in pins:
            [pin] = pins[need.name].specifier
            assert pin.operator == "==" and need.specifier.contains(pin.version), need.name


@pytest.mark.parametrize("script", **named([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]))
def test_scripts_are_valid_and_executable(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()


def test_help_lists_every_target():
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert [name for name in phony if not re.search(rf"^{name}\b", shown, re.M)] == []
    assert set(phony) == TARGETS
