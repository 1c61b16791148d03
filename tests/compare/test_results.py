"""The numbers of the tables against numbers computed by hand, and the pictures of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from slope import cli
from slope.compare import columns, figure, plan, results, table

SMOKE = "experiment=compare/smoke"


@pytest.fixture
def comparison(tmp_path):
    return plan.load([SMOKE, f"paths.root={tmp_path}", "compare.seeds=[0,1,2]"])


def finish(run, loss, *, memory=100, rows=((10, 5.0, 1000.0), (20, None, 500.0))):
    """What a finished run leaves; rows are (step, validation loss, tokens per second)."""
    run.log_dir.mkdir(parents=True)
    numbers = {
        "val_loss": loss, "val_perplexity": math.exp(loss), "steps": 20,
        "peak_memory_bytes": memory, "optimizer_state_bytes": 8 * memory,
        "parameters_stored": 12345, "wall_seconds": 3.0,
    }  # fmt: skip
    (run.log_dir / "summary.json").write_text(json.dumps(numbers))
    with open(run.log_dir / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "val/loss", "tokens_per_second", "one more"])
        for step, val_loss, speed in rows:
            writer.writerow([step, 256 * step, val_loss, speed, ""])


def stop(run, **outcome):
    run.log_dir.mkdir(parents=True)
    (run.log_dir / plan.OUTCOME).write_text(json.dumps(outcome))


@pytest.fixture
def filled(comparison):
    """Dense has 5.0, 5.1, 5.3; slope 5.2, 5.4 and a failure; slope-lora diverged but for one."""
    runs = {(run.method, run.seed): run for run in comparison.runs}
    for seed, loss in enumerate((5.0, 5.1, 5.3)):
        finish(runs["dense", seed], loss, memory=(100, 300, 200)[seed])
    finish(runs["slope", 0], 5.2, rows=[(20, 5.2, 250.0)])
    finish(runs["slope", 1], 5.4, rows=[(20, 5.4, 125.0)])
    stop(runs["slope", 2], status="failed", message="the disk is full")
    finish(runs["slope-lora", 0], 5.5)
    finish(runs["slope-lora", 1], math.nan)
    stop(runs["slope-lora", 2], status="diverged", message="loss is nan", step=7)
    return comparison


def test_numbers_of_a_method_are_those_computed_by_hand(filled):
    dense, slope, lora = results.read(filled)
    # (5.0 + 5.1 + 5.3) / 3; deviations -0.1333, -0.0333, 0.1667: sqrt(0.04667 / 2)
    assert dense.val_loss == pytest.approx((5.133333, 0.152753), abs=1e-6)
    perplexities = [math.exp(5.0), math.exp(5.1), math.exp(5.3)]
    mean = sum(perplexities) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in perplexities) / 2)
    assert dense.val_perplexity == pytest.approx((mean, deviation))
    assert dense.difference is None
    # 256 tokens a step: 0.256 s at 1000 tokens/s, 0.512 s at 500; the median of two is between.
    assert (dense.step_ms, dense.step_ratio) == (pytest.approx(384), 1)
    assert (dense.peak_memory_bytes, dense.optimizer_state_bytes) == (200, 1600)

    assert slope.val_loss == pytest.approx((5.3, math.sqrt(0.02)))
    # 5.2 - 5.0 = 0.2 and 5.4 - 5.1 = 0.3: mean 0.25, deviation 0.0707, over sqrt(2) = 0.05
    assert slope.difference == pytest.approx((0.25, 0.05))
    assert (slope.step_ms, slope.step_ratio) == (pytest.approx(1536), pytest.approx(4))
    assert [run.message for run in slope.having("failed")] == ["the disk is full"]

    assert lora.val_loss == (5.5, None)
    assert lora.difference == (pytest.approx(0.5), None)
    assert [(run.seed, run.diverged_at_step) for run in lora.having("diverged")] == [
        (1, 20),
        (2, 7),
    ]


def test_methods_without_a_run_are_left_out_and_unfinished_ones_have_no_numbers(comparison):
    assert results.read(comparison) == []
    stop(comparison.runs[1], status="failed", message="x")
    (only,) = results.read(comparison)
    assert (only.method.label, only.val_loss, only.step_ms) == ("slope", None, None)


def test_without_a_baseline_there_is_no_difference(comparison):
    finish(comparison.runs[1], 5.0)
    (only,) = results.read(comparison)
    assert (only.difference, only.step_ratio) == (None, None)


def test_tables_hold_every_run_and_every_method(filled):
    found = results.read(filled)
    runs, methods, text = table.write(filled, found)
    rows = list(csv.DictReader(runs.read_text().splitlines()))
    assert len(rows) == 9
    assert rows[0] == {
        "method": "dense", "seed": "0", "status": "finished", "message": "", "val_loss": "5.0",
        "diverged_at_step": "", "val_perplexity": str(math.exp(5.0)), "step_ms": "384.0",
        "peak_memory_bytes": "100", "optimizer_state_bytes": "800", "parameters_stored": "12345",
    }  # fmt: skip
    assert [row["status"] for row in rows[5:]] == ["failed", "finished", "diverged", "diverged"]
    rows = list(csv.DictReader(methods.read_text().splitlines()))
    assert [row["method"] for row in rows] == ["dense", "slope", "slope-lora"]
    assert (rows[1]["finished"], rows[1]["failed"], rows[2]["diverged"]) == ("2", "1", "2")
    assert float(rows[1]["difference_stderr"]) == pytest.approx(0.05)
    assert rows[2]["val_loss_std"] == ""
    lines = text.read_text().splitlines()
    cells = (
        "| slope | SLoPe without adapters | 5.3000 ± 0.1414 | +0.2500 ± 0.0500 | 201.34 ± 28.38 "
    )
    assert any(line.startswith(cells + "| 1536.0 | 4.00 | 0.00 |") for line in lines)
    assert any(line.endswith("| 2 of 3, at step 20, 7 |") for line in lines)
    assert "- slope seed 2: the disk is full" in lines
    assert "8 of 9 runs ended: 3 methods, seeds 0, 1, 2." in lines[2]


def test_json_has_the_numbers_of_the_tables_and_stands_alone_on_stdout(filled, capsys):
    words = [SMOKE, f"paths.root={filled.directory.parents[1]}", "compare.seeds=[0,1,2]"]
    assert cli.main(["compare", *words, "--only", "dense,slope-lora", "--json"]) == 0
    said = capsys.readouterr()
    assert "slope: compare name=compare-smoke" in said.err
    assert "val loss" in said.err
    found = json.loads(said.out, parse_constant=pytest.fail)
    assert (found["comparison"], found["baseline"]) == ("compare-smoke", "dense")
    assert found["seeds"] == [0, 1, 2]
    assert all(Path(path).is_file() for path in found["files"])
    methods = found["methods"]
    with open(filled.directory / table.METHODS, newline="") as file:
        for method, row in zip(methods, csv.DictReader(file), strict=True):
            assert method.pop("scores") == method.pop("published") == {}  # nothing was fine-tuned
            shown = {k: "" if v is None else str(v) for k, v in method.items() if k != "runs"}
            assert shown == row
    with open(filled.directory / table.RUNS, newline="") as file:
        runs = [{"method": m["method"], **run} for m in methods for run in m["runs"]]
        for run, row in zip(runs, csv.DictReader(file), strict=True):
            assert Path(run.pop("log_dir")).is_dir()
            assert run.pop("scores") == {}
            assert {k: "" if v is None else str(v) for k, v in run.items()} == row
    assert methods[0]["val_loss_mean"] == pytest.approx((5.0 + 5.1 + 5.3) / 3)
    assert methods[1]["runs"][2]["message"] == "the disk is full"


def test_a_perplexity_beyond_floats_is_null_in_json(comparison, capsys):
    for run in comparison.runs:
        finish(run, 5.0)
    path = comparison.runs[0].log_dir / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_perplexity": math.inf}))
    words = [SMOKE, f"paths.root={comparison.directory.parents[1]}", "compare.seeds=[0,1,2]"]
    assert cli.main(["compare", *words, "--json"]) == 0
    method = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["methods"][0]
    assert method["runs"][0]["val_perplexity"] is None
    assert (method["val_perplexity_mean"], method["val_perplexity_std"]) == (None, None)


def test_console_table_is_in_order_of_loss_and_says_what_diverged(filled):
    written = io.StringIO()
    Console(width=120, file=written).print(table.console_table(filled, results.read(filled)))
    text = written.getvalue()
    assert text.index("dense ") < text.index("slope ") < text.index("slope-lora")
    assert "1/3, diverged at step 20, 7" in text


@pytest.mark.parametrize("tuned", [(), ("SQuAD", "GLUE")])
def test_console_table_fits_80_columns_and_loses_no_digit(filled, tuned):
    shown = dataclasses.replace(
        filled, columns=tuple(columns.Column(name, (name.lower(),), "hub") for name in tuned)
    )
    scores = dict.fromkeys(tuned, results.Spread(89.125, 0.25))
    found = [dataclasses.replace(result, scores=scores) for result in results.read(filled)]
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    Console(width=80, file=written).print(table.console_table(shown, found))
    written.seek(0)
    _, edge, *lines, last = written.read().splitlines()
    # Without UTF-8 the table is drawn in letters, and has edges on both sides.
    assert edge == last == f"+{'-' * (len(edge) - 2)}+" and len(edge) <= 80
    rows = [line for line in lines if not line.startswith("|-")]
    assert all(len(row) == len(edge) and row[0] == row[-1] == "|" for row in rows)
    cells = zip(*(row.split("|")[1:-1] for row in rows), strict=True)
    text = "\n".join(" ".join(" ".join(column).split()) for column in cells)
    for whole in ("5.1333 ? 0.1528", "+0.2500 ? 0.0500", "170.92", "1536.0", "diverged", *tuned):
        assert whole in text
    assert text.count("89.12 ? 0.25") == 3 * len(tuned)


def saved_figures(monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )
    return figures


def test_figure_has_curves_in_every_panel_and_one_row_per_method(filled, monkeypatch):
    figures = saved_figures(monkeypatch)
    path = figure.draw(filled, results.read(filled))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in path.with_suffix(".svg").read_text()
    panel, dots = figures[0].get_axes()
    assert panel.get_title() == "adapters"
    names = [text.get_text() for text in panel.get_legend().get_texts()]
    assert names == ["dense", "slope", "slope-lora"]
    assert [text.get_text() for text in dots.get_yticklabels()] == names
    assert [text.get_text() for text in dots.texts] == ["2 of 3 diverged"]


def test_figure_of_a_comparison_in_which_nothing_has_finished(comparison):
    stop(comparison.runs[0], status="diverged", message="loss is nan", step=2)
    assert figure.draw(comparison, results.read(comparison)).is_file()


@pytest.mark.parametrize("losses", [(5.0,), (5.2, 5.0)])
def test_a_curve_of_one_validation_is_seen(comparison, monkeypatch, losses):
    rows = [(10 * number, loss, 1000.0) for number, loss in enumerate(losses, start=1)]
    for run in comparison.runs:
        finish(run, 5.0, rows=rows)
    figures = saved_figures(monkeypatch)
    figure.draw(comparison, results.read(comparison))
    lines = {line.get_label(): line for line in figures[0].get_axes()[0].get_lines()}
    assert (lines["dense"].get_marker() != "None") == (len(losses) == 1)


def test_figure_before_any_run_has_finished_warns_of_nothing(comparison):
    comparison.runs[0].log_dir.mkdir(parents=True)
    (comparison.runs[0].log_dir / "config.yaml").touch()
    assert figure.draw(comparison, results.read(comparison)).is_file()


def test_method_far_beyond_the_others_is_written_at_the_edge(tmp_path, monkeypatch):
    words = ["experiment=compare/column_mask", f"paths.root={tmp_path}", "compare.seeds=[0,1]"]
    comparison = plan.load(words)
    for run in comparison.runs:
        near = list(comparison.methods).index(run.method) / 10 + run.seed / 100
        finish(run, 9.0 if run.method == "never" else 5.0 + near)
    figures = saved_figures(monkeypatch)
    figure.draw(comparison, results.read(comparison))
    dots = figures[0].get_axes()[-1]
    assert [text.get_text() for text in dots.texts] == ["9.00 \N{RIGHTWARDS ARROW}"]
    assert dots.get_xlim()[1] < 6


def test_sessions_are_added_to_the_environment_file(tmp_path):
    table.add_session(tmp_path / "env.json", {"jobs": 2})
    table.add_session(tmp_path / "env.json", {"jobs": 1})
    assert json.loads((tmp_path / "env.json").read_text()) == [{"jobs": 2}, {"jobs": 1}]
