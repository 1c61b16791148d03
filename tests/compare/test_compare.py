"""Whole comparisons, each run in a process with torch."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from slope import cli
from slope.compare import plan, runner
from slope.training import checkpoint

EXACT = ("step", "train/loss", "val/loss", "grad_norm")
# The command line of a child process; it does not check first, which takes seconds.
DRIVER = """
import sys
from slope import cli
from slope.compare import runner
runner.check = lambda runs: {"accelerator": "cpu", "machine": {}}
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def unchecked(monkeypatch):
    monkeypatch.setattr(runner, "check", lambda runs: {"accelerator": "cpu", "machine": {}})


def table_of(folder):
    rows = csv.DictReader((folder / "comparison.csv").read_text().splitlines())
    return {row["method"]: row for row in rows}


def rows_of(run):
    rows = csv.DictReader((run.log_dir / "metrics.csv").read_text().splitlines())
    return [[row[name] for name in EXACT] for row in rows]


def test_comparison_with_a_diverging_and_a_failing_method(smoke, tmp_path, capsys, monkeypatch):
    words = [
        *smoke, f"paths.root={tmp_path}", "compare.seeds=[3]",
        "compare.methods.slope-lora.overrides=['pruner=slope','train.optimizer.lr=1e30']",
    ]  # fmt: skip
    folder = tmp_path / "logs/compare-smoke"
    blocked = tmp_path / "checkpoints/compare-smoke/slope/seed3"
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # a file where the run wants a folder

    assert cli.main(["compare", *words, "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("slope: compare name=compare-smoke: 3 runs, 0 of them ended before")
    assert "slope: error: slope seed 3 failed: " in said.err
    rows = table_of(folder)
    assert {method: row["status"] for method, row in rows.items()} == {
        "dense": "finished", "slope": "failed", "slope-lora": "diverged"
    }  # fmt: skip
    step = rows["slope-lora"]["diverged_at_step"]
    assert 0 < int(step) <= 20
    assert f"| 1 of 1, at step {step} |" in (folder / "comparison.md").read_text()
    assert float(rows["dense"]["step_ms"]) > 0
    assert "Traceback" in (folder / "slope/seed3" / runner.OUTPUT).read_text()
    for name in ("comparison.md", "methods.csv", "comparison.png", "comparison.svg"):
        assert (folder / name).stat().st_size
    assert len(list((folder / "configs").iterdir())) == 3
    (session,) = json.loads((folder / "env.json").read_text())
    cores = runner.cores()
    assert (session["jobs"], session["threads"], session["cores"]) == (2, max(1, cores // 2), cores)
    assert session["torch"]
    assert session["cpu"]
    assert "/3 slope-lora seed 3: diverged at step" in (folder / "compare.log").read_text()

    # The same command repeats only what failed.
    blocked.unlink()
    done = (folder / "dense/seed3/summary.json").stat().st_mtime_ns
    monkeypatch.setattr(runner, "check", lambda runs: {"accelerator": "cpu", "machine": {}})
    assert cli.main(["compare", *words]) == 0
    assert "3 runs, 2 of them ended before" in capsys.readouterr().out
    assert table_of(folder)["slope"]["status"] == "finished"
    assert (folder / "dense/seed3/summary.json").stat().st_mtime_ns == done

    # Nothing to do: tables only, in this process.
    monkeypatch.setattr(runner, "check", None)
    assert cli.main(["compare", *words, "--only", "dense"]) == 0


def test_a_run_may_take_several_devices(smoke, tmp_path, unchecked):
    words = [
        *smoke, f"paths.root={tmp_path}", "compare.seeds=[0]", "trainer.devices=2",
        "trainer.max_steps=4", "trainer.val_check_interval=4", "--only", "dense,slope",
    ]  # fmt: skip
    assert cli.main(["compare", *words]) == 0
    rows = table_of(tmp_path / "logs/compare-smoke")
    assert [rows[method]["status"] for method in ("dense", "slope")] == ["finished"] * 2
    last = tmp_path / "checkpoints/compare-smoke/slope/seed0/last.ckpt"
    assert len(checkpoint.load(last)["slope"]["rng"]) == 2  # of each process


def start(words):
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, "compare", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process):
    for _ in range(1200):
        if condition():
            return
        if process is not None and process.poll() is not None:
            pytest.fail(f"ended early: {process.communicate()[0]}")
        time.sleep(0.05)
    pytest.fail("waited for a minute")


def pid_of(run):
    """The process that does a run: the one whose command line names its configuration."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run.config_file).encode() in arguments:
            return int(path.parent.name)
    return None


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_killed_comparison_goes_on_where_it_was(smoke, tmp_path, unchecked):
    words = [
        *smoke, f"paths.root={tmp_path}", "compare.seeds=[0]", "--only", "slope,slope-lora",
        "--jobs", "2", "trainer.max_steps=400", "callbacks.checkpoint.every_n_steps=20",
        "trainer.val_check_interval=100",
    ]  # fmt: skip
    overrides = [word for word in words if "=" in word]
    slope, lora = plan.select(plan.load(overrides), ["slope", "slope-lora"])

    # Two deaths: of one run, which is reported, and of the parent, after which the other run saves.
    parent = start(words)
    wait_for(lambda: min(map(runner.last_step, (slope.log_dir, lora.log_dir))) >= 30, parent)
    os.kill(pid_of(slope), signal.SIGKILL)
    log = tmp_path / "logs/compare-smoke/compare.log"
    wait_for(lambda: "slope seed 0 failed: its process was killed by SIGKILL" in log.read_text(),
             parent)  # fmt: skip
    parent.kill()
    parent.communicate()
    wait_for(lambda: pid_of(lora) is None, None)
    assert "SIGTERM" in (lora.log_dir / "run.log").read_text()
    assert [slope.state(), lora.state()] == ["begun", "begun"]
    assert runner.last_step(lora.log_dir) < 400

    assert cli.main(["compare", *words]) == 0
    assert [slope.state(), lora.state()] == ["finished", "finished"]
    for run in (slope, lora):
        assert "going on from step" in (run.log_dir / "run.log").read_text()
    # Equal data, equal weights: the two are one until the adapters wake, killed or not.
    before, after = rows_of(slope), rows_of(lora)
    assert len(before) == len(after) == 400
    assert before[:320] == after[:320]
    assert before[321:] != after[321:]


def test_wrong_setting_of_one_method_is_found_before_any_run(smoke, tmp_path, capsys):
    words = [*smoke, f"paths.root={tmp_path}", "compare.methods.slope.overrides=['pruner=slope',"
             "'pruner.lora_rank=999']"]  # fmt: skip
    assert cli.main(["compare", *words]) == 1
    said = capsys.readouterr()
    assert "slope: error: method 'slope': pruner.lora_rank=999 does not fit" in said.err
    assert "Traceback" not in said.err
    assert not list(tmp_path.glob("logs/*/*/seed*/config.yaml"))


def test_every_missing_start_is_named_with_its_methods(tmp_path, capsys):
    words = ["experiment=bert/table_mixed_small", "~compare.finetune"]
    assert cli.main(["compare", *words, f"paths.root={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "method 'dense' and '24-24' and '24-28' and '28-24': init_from=" in said
    assert "'slope train experiment=bert/demo name=bert-demo-dense pruner=none'" in said
    assert "method 'wanda-24-24' and 'wanda-24-28' and 'wanda-28-24': init_from=" in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["experiment=compare/smok"], 2, "did you mean experiment=compare/smoke?"),
        (["experiment=compare/smoke", "--only", "dens"], 2, "did you mean 'dense'?"),
        (["experiment=compare/smoke", "--jobs", "0"], 2, "--jobs 0 must be at least 1."),
        (
            ["experiment=compare/smoke", "--jobs", "2", "trainer.devices=2"],
            2,
            "--jobs 2 with trainer.devices=2: runs at once have one device each; type trainer.dev",
        ),
        ([], 2, "nothing to compare; choose experiment=bert/"),
    ],
)
def test_wrong_command_line(arguments, code, message, capsys):
    assert cli.main(["compare", *arguments]) == code
    assert message in capsys.readouterr().err


def test_lists_of_comparisons_and_methods(capsys):
    assert cli.main(["compare", "--list"]) == 0
    assert "experiment=compare/smoke\n" in capsys.readouterr().out
    assert cli.main(["compare", "experiment=compare/smoke", "--list"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert " ".join(first.split()) == "dense no weight is pruned"
    assert cli.main(["compare", "--list", "--json"]) == 0
    assert "compare/smoke" in json.loads(capsys.readouterr().out)["experiments"]
    assert cli.main(["compare", "experiment=compare/smoke", "--list", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["methods"][0]
    assert (first["label"], first["about"]) == ("dense", "no weight is pruned")


def test_comparison_that_another_process_works_on_is_an_error(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "logs/compare-smoke"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert cli.main(["compare", "experiment=compare/smoke", f"paths.root={tmp_path}"]) == 1
    assert "another process works on comparison 'compare-smoke'" in capsys.readouterr().err
