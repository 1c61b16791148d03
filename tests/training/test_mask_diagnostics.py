"""Mask diagnostics of a run: what is written when, and that kills and restarts leave no trace."""

from __future__ import annotations

import csv
import signal

import pytest
import torch
from omegaconf import OmegaConf
from test_resume import kill_before_row, kill_in_micro_batch, kill_in_validation, kill_in_write
from tiny_runs import assert_equal, kill
from torch import nn

import slope
from slope.configs import compose
from slope.diagnostics import COLUMNS as MASK_COLUMNS
from slope.methods.evolving import Evolution
from slope.plotting import DIAGNOSTICS
from slope.training import program
from slope.training.diagnostics import FILE, MaskDiagnostics, every_n_steps
from slope.training.metrics import COLUMNS, DIAGNOSTICS_COLUMNS, MetricsFile


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def kill_between_rows():
    """Die with the rows of the second measured step half-written."""
    append, seen = MetricsFile.append, [0]

    def half(self, *rows):
        if len(rows) > 1:
            seen[0] += 1
            if seen[0] == 2:
                append(self, *rows[:2])
                self._file.write("6,transformer.h.1")
                self._file.flush()
                kill()
        append(self, *rows)

    MetricsFile.append = half


# -- a run -----------------------------------------------------------------------------------------


def test_every_validation_is_measured_by_default(finished):
    logs = finished.root / "logs" / "whole"
    rows = read(logs / FILE)
    assert tuple(rows[0]) == DIAGNOSTICS_COLUMNS == ("step", "layer", *MASK_COLUMNS)
    layers = [row["layer"] for row in rows if row["step"] == "3"]
    assert len(layers) == 8 and layers[0] == "transformer.h.0.attn.c_proj"
    assert [row["step"] for row in rows] == [str(step) for step in (3, 6, 9, 12) for _ in layers]
    totals = [row for row in rows if row["layer"] == "total"]
    assert layers[-1] == "total" and len(totals) == 4
    for row in totals:
        assert row["density"] == "0.5" and row["lemma"] == "0.09375" and row["flip_rate"] == "0.0"
        assert 0.07 < float(row["imposed_sparsity"]) < 0.12
        assert 0.9 < float(row["kept_energy_backward"]) < 1 and row["kept_energy"] == ""
    assert float(totals[0]["column_flip_rate"]) > 0
    # Adapters sleep until step 9.
    assert [float(row["adapter_norm"]) > 0 for row in totals] == [False, False, False, True]
    assert (logs / DIAGNOSTICS).stat().st_size > 0


def test_totals_are_columns_of_the_metrics(finished):
    rows = finished.rows("whole")
    totals = read(finished.root / "logs" / "whole" / FILE)
    totals = {row["step"]: row for row in totals if row["layer"] == "total"}
    assert tuple(rows[0]) == COLUMNS
    for row in rows:
        for column in MASK_COLUMNS:
            expected = totals[row["step"]][column] if row["step"] in totals else ""
            assert row[f"mask/{column}"] == expected


def test_measuring_changes_nothing(runs, finished):
    runs.run("name=unwatched", "callbacks.diagnostics.every_n_steps=0")
    assert not (runs.root / "logs" / "unwatched" / FILE).exists()
    one, other = runs.last("unwatched"), finished.last("whole")
    for key in ("state_dict", "optimizer_states"):
        assert_equal(one[key], other[key], key)
    assert_equal(one["slope"]["rng"], other["slope"]["rng"], "rng")
    assert runs.exact_rows("unwatched") == finished.exact_rows("whole")
    assert {row["mask/density"] for row in runs.rows("unwatched")} == {""}


def test_a_dense_run_has_nothing_to_measure(runs):
    runs.run("name=dense", "pruner=none", "trainer.max_steps=3")
    assert not (runs.root / "logs" / "dense" / FILE).exists()


def test_masks_that_the_next_step_begins_with_are_compared(runs):
    """FST searches before steps 4 and 8, counted from 0; its dense phase begins before step 9."""
    runs.run(
        "name=fst", "pruner=fst", "pruner.mask_interval=4", "pruner.dense_start=0.75",
        "callbacks.diagnostics.every_n_steps=1",
    )  # fmt: skip
    totals = [row for row in read(runs.root / "logs" / "fst" / FILE) if row["layer"] == "total"]
    assert [int(row["step"]) for row in totals] == list(range(1, 13))
    flips = {int(row["step"]): float(row["flip_rate"]) for row in totals}
    assert [step for step, rate in flips.items() if rate] == [4, 8, 9]
    assert flips[9] == 0.5
    assert [row["density"] for row in totals] == ["0.5"] * 8 + ["1.0"] * 4
    kept = [float(row["kept_energy"]) for row in totals]
    assert all(0.6 < share < 0.9 for share in kept[:8]) and kept[8:] == [1.0] * 4


def test_an_evolving_mask_is_measured_where_it_evolves(runs):
    runs.run("name=evolving", "pruner.evolve_interval=4", "trainer.val_check_interval=6")
    rows = read(runs.root / "logs" / "evolving" / FILE)
    totals = {int(row["step"]): float(row["flip_rate"]) for row in rows if row["layer"] == "total"}
    # Steps 4 and 8, counted from 0, of which 9 = 0.75 x 12 are open to swaps.
    assert list(totals) == [5, 6, 9, 12]
    assert [step for step, rate in totals.items() if rate] == [5, 9]


@pytest.mark.parametrize(
    "before",
    [
        kill_in_micro_batch(6),
        kill_in_micro_batch(20),
        kill_in_validation,
        kill_in_write(3),
        kill_before_row,
        kill_between_rows,
    ],
)
def test_kill_anywhere_and_the_file_is_that_of_an_unbroken_run(runs, finished, before):
    assert runs.fork("name=whole", before=before) == -signal.SIGKILL
    assert runs.fork("name=whole", "resume=True") == 0
    theirs, ours = (root / "logs" / "whole" / FILE for root in (finished.root, runs.root))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_of_an_older_version_goes_on(runs, finished):
    runs.fork("name=whole", before=kill_in_micro_batch(15))
    logs = runs.root / "logs" / "whole"
    (logs / FILE).unlink()
    with open(logs / "metrics.csv", newline="") as file:
        rows = [row[: COLUMNS.index("mask/density")] for row in csv.reader(file)]
    with open(logs / "metrics.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    assert runs.fork("name=whole", "resume=True") == 0
    assert runs.exact_rows("whole") == finished.exact_rows("whole")
    measured = [row["step"] for row in runs.rows("whole") if row["mask/density"]]
    assert measured == ["9", "12"]
    assert {row["step"] for row in read(logs / FILE)} == {"9", "12"}


# -- the parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [("null", 3), (0, 0), (7, 7)])
def test_interval(runs, given, expected):
    assert every_n_steps(runs.config(f"callbacks.diagnostics.every_n_steps={given}")) == expected


def test_an_interval_that_is_none(runs):
    with pytest.raises(ValueError, match="every_n_steps=-1 must be a whole number of optimizer st"):
        program.check(runs.config("callbacks.diagnostics.every_n_steps=-1"))
    with pytest.raises(ValueError, match="every_n_steps must be a whole number or null"):
        compose(["callbacks.diagnostics.every_n_steps=True"])


def test_a_configuration_without_the_key_measures_at_validations():
    cfg = OmegaConf.create({"trainer": {"val_check_interval": 3}, "callbacks": {}})
    assert every_n_steps(cfg) == 3


@pytest.mark.parametrize(
    ("every", "evolution", "expected"),
    [
        (4, None, [4, 8, 10]),
        (100, None, [10]),
        (4, Evolution(3, stop=0.7), [4, 7, 8, 10]),
    ],
)
def test_steps_that_are_due(tmp_path, every, evolution, expected):
    schedule = slope.SlopeSchedule(10, lora_start=None, evolution=evolution)
    with MaskDiagnostics(tmp_path / FILE, 0, every, schedule) as diagnostics:
        assert [step for step in range(1, 11) if diagnostics.due(step)] == expected


def test_the_layers_stay_as_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(16, 8))
    slope.sparsify(model, slope.SparsityConfig(column_mask_interval=2, adapter_rank=2))
    schedule = slope.SlopeSchedule(10, lora_start=0.1)
    with MaskDiagnostics(tmp_path / FILE, 0, 2, schedule) as diagnostics:
        diagnostics.begin(model)
        model[0].values.data.neg_().add_(torch.randn_like(model[0].values))
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        totals = diagnostics.measure(model, 2)
    assert totals["mask/column_flip_rate"] > 0  # the refresh before the third step
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not slope.adapters_active(model)
    assert [row["layer"] for row in read(tmp_path / FILE)] == ["0", "total"]


def test_metrics_of_an_older_version_get_the_new_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,lr\n1,5.0,0.1\n2,4.0,0.1\n3,3.0\n")
    with MetricsFile(path, step=2) as metrics:
        metrics.append({"step": 3, "mask/density": 0.5})
    rows = read(path)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["step"], row["train/loss"], row["lr"]) for row in rows] == [
        ("1", "5.0", "0.1"), ("2", "4.0", "0.1"), ("3", "", ""),
    ]  # fmt: skip
    assert [row["mask/density"] for row in rows] == ["", "", "0.5"]


def test_metrics_with_columns_that_nobody_knows(tmp_path):
    path = tmp_path / FILE
    path.write_text("step,layer,colour\n1,a,red\n")
    with pytest.raises(ValueError, match="is not a metrics file of slope .*'colour'"):
        MetricsFile(path, 1, DIAGNOSTICS_COLUMNS)
    assert path.read_text() == "step,layer,colour\n1,a,red\n"
