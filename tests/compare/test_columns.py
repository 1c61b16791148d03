"""Columns that fine-tuning gives: what may be asked for, and a whole comparison with them."""

from __future__ import annotations

import csv
import json
import math

import pytest
from bert_runs import BertRuns, write_corpus
from tiny_bert import write_squad, write_sst2

from slope import cli
from slope.compare import columns, plan, results, table

RANKS = "experiment=bert/table_ranks"
SMALL = "experiment=bert/table_ranks_small"


def load(root, *overrides):
    return plan.load([*overrides, f"paths.root={root}"])


def test_the_papers_tables_end_in_their_columns(tmp_path):
    for name in ("ranks", "mixed", "modules"):
        comparison = load(tmp_path, f"experiment=bert/table_{name}")
        assert [column.label for column in comparison.columns] == ["SQuAD", "GLUE"]
        assert all(m.published.keys() == {"SQuAD", "GLUE"} for m in comparison.methods.values())
        run = comparison.runs[-1]
        assert [chosen.task for chosen in run.fine_tunings] == [
            "squad", "glue/cola", "glue/sst2", "glue/mrpc", "glue/stsb", "glue/qqp", "glue/rte",
            "glue/mnli", "glue/qnli",
        ]  # fmt: skip
        squad = run.fine_tunings[0]
        assert squad.directory == run.log_dir / "finetune-squad"
        assert squad.init_from == run.cfg.paths.checkpoint_dir
        assert (squad.lr, squad.batch_size, squad.max_length) == (3e-5, 24, 384)
    methods = load(tmp_path, RANKS).methods
    assert methods["r64"].published == {"SQuAD": 89.5, "GLUE": 78.2}


SQUAD = {"tasks": ["squad"], "data": "hub"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([1], r"compare.finetune=\[1\] must be a section, for example"),
        ({"RTE": 7}, "compare.finetune.RTE=7 must have tasks and data"),
        ({"RTE": {"tasks": ["glue/rte"]}}, "RTE=.* must have tasks and data"),
        ({"RTE": {**SQUAD, "date": 1}}, "RTE=.* and may have settings, for example"),
        ({"RTE": {**SQUAD, "tasks": []}}, r"RTE.tasks=\[\] must name different tasks"),
        ({"RTE": {**SQUAD, "tasks": "squad"}}, "RTE.tasks='squad' must name different tasks"),
        ({"RTE": {**SQUAD, "settings": ["lr"]}}, r"RTE.settings=\['lr'\] must be a section, for"),
        ({"RTE": {**SQUAD, "settings": {"data": "x"}}},
         "RTE.settings sets data, which follows .*; leave it out and set .*RTE.data."),
        ({"A": SQUAD, "B": SQUAD}, "compare.finetune has squad in more than one column"),
        ({"RTE": {**SQUAD, "settings": {"name": "x"}}}, "sets name, .* comparison; leave it out.$"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_say_why(section, message):
    with pytest.raises(ValueError, match=message):
        columns.read(section)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.finetune.RTE.tasks=[glue/rt]",
         "compare.finetune.RTE: task=glue/rt is unknown; did you mean task=glue/rte"),
        ("+compare.finetune.RTE.settings.lrate=1",
         "compare.finetune.RTE: 'lrate=1': unknown key; did you mean lr"),
        ("compare.finetune.SQuAD.settings.max_length=384",
         "SQuAD: max_length=384 of squad is longer .* 128 positions; add max_length=128 to"),
        ("+compare.methods.r0.published={MNLI: 3}",
         r"r0.published=\{'MNLI': 3\} must give numbers for columns .* \(SQuAD, RTE\)"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_the_comparison_say_why(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, SMALL, override)


def test_only_bert_is_fine_tuned(tmp_path):
    column = "+compare.finetune={SQuAD: {tasks: [squad], data: hub}}"
    with pytest.raises(ValueError, match="needs a BERT, and model.family is gpt2; .*type ~compare"):
        load(tmp_path, "experiment=compare/smoke", column)


def test_a_column_is_the_mean_of_its_tasks_and_waits_for_all():
    glue = columns.Column("GLUE", ("glue/rte", "glue/cola"), "hub")
    squad = columns.Column("SQuAD", ("squad",), "hub")
    scores = {"glue/rte": 60.0, "glue/cola": 30.0}
    assert columns.column_scores([squad, glue], scores) == {"GLUE": 45.0}
    assert columns.column_scores([squad, glue], {"squad": 80.0, "glue/rte": 60.0}) == {
        "SQuAD": 80.0
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished comparison of one method, fine-tuned on two tasks, and what was typed."""
    root = tmp_path_factory.mktemp("tuned")
    runs = BertRuns(root, write_corpus(tmp_path_factory.mktemp("tuned_corpus")))
    runs.phase1()
    write_sst2(root / "sets/SST-2", train=16, dev=8)
    write_squad(root / "sets/squad", train=16, dev=8)
    words = [
        SMALL, *runs.base, *runs.second[1:], "trainer.max_steps=4", "compare.seeds=[0]",
        "compare.baseline=r0",
        *(f"~compare.methods.{label}" for label in ("dense", "r1", "r2", "r8")),
        "+compare.methods.r0.published={SQuAD: 89.1}",
        *(f"compare.finetune.SQuAD.settings.{key}" for key in (
            "seeds=[0,1]", "batch_size=8", "epochs=1", "max_length=32")),
        "+compare.finetune.SQuAD.settings.max_query_length=8",
        "compare.finetune.RTE.tasks=[glue/sst2]", "compare.finetune.RTE.settings.max_length=32",
    ]  # fmt: skip
    words = [word for word in words if not word.startswith("trainer.max_steps=8")]
    assert cli.main(["compare", *words, "--jobs", "1"]) == 0
    return root, words


def test_a_comparison_ends_in_the_scores_of_its_tasks(tuned, capsys):
    root, words = tuned
    comparison = plan.load(words)
    folder = comparison.directory
    found = {result.method.label: result for result in results.read(comparison)}
    assert list(found) == ["r0"]
    squad = json.loads((folder / "r0/seed0/finetune-squad/summary.json").read_text())
    assert squad["seeds"] == [0, 1]
    assert squad["init_from"] == f"{root}/checkpoints/{comparison.name}/r0/seed0"
    assert "2:4" in squad["layers"]
    scores = found["r0"].runs[0].scores
    assert scores["SQuAD"] == pytest.approx(squad["metrics"]["score"]["mean"])
    assert scores.keys() == {"SQuAD", "RTE", "squad", "glue/sst2"}
    text = (folder / "comparison.md").read_text()
    assert "| method | what it is | SQuAD | SQuAD, published | RTE |" in text
    r0 = next(line for line in text.splitlines()[::-1] if line.startswith("| r0 |"))
    assert r0.split(" | ")[2] == f"{found['r0'].scores['SQuAD'].mean:.2f}"
    assert r0.split(" | ")[3] == "89.1"
    rows = csv.DictReader((folder / "comparison.csv").read_text().splitlines())
    assert float(next(rows)["RTE"]) == scores["RTE"]
    row = next(csv.DictReader((folder / "methods.csv").read_text().splitlines()))
    assert float(row["SQuAD_mean"]) == scores["SQuAD"]
    assert row["SQuAD_std"] == ""
    document = table.document(comparison, list(found.values()))
    assert document["methods"][0]["published"] == {"SQuAD": 89.1}
    json.dumps(document)
    assert "r0 seed 0: val loss" in (folder / "compare.log").read_text()
    assert ", squad " in (folder / "compare.log").read_text()


def test_a_run_whose_fine_tuning_is_missing_goes_on_with_that_alone(tuned, monkeypatch):
    root, words = tuned
    run = plan.load(words).runs[0]
    before = (run.log_dir / plan.SUMMARY).stat().st_mtime_ns
    result = run.log_dir / "finetune-squad/seed1/result.json"
    gone = json.loads(result.read_text())
    result.unlink()
    result.parent.rename(result.parent.with_name("away"))
    assert run.state() == "begun"
    assert [chosen.task for chosen in run.left_to_tune()] == ["squad"]
    monkeypatch.setattr(
        "slope.compare.runner.check", lambda runs: {"accelerator": "cpu", "machine": {}}
    )
    assert cli.main(["compare", *words, "--jobs", "1"]) == 0
    again = json.loads(result.read_text())
    assert {**again, "seconds": 0} == {**gone, "seconds": 0}
    assert (run.log_dir / plan.SUMMARY).stat().st_mtime_ns == before


def test_missing_task_data_is_found_before_any_run(tuned, tmp_path, capsys):
    _, words = tuned
    code = cli.main(
        ["compare", *words, "name=another", f"compare.finetune.SQuAD.data={tmp_path}/none"]
    )
    said = capsys.readouterr().err
    assert code == 1
    assert f"fine-tuning on squad: there is no '{tmp_path}/none/train-v1.1.json'" in said
    assert "~compare.finetune leaves fine-tuning out" in said
    assert not list(plan.load([*words, "name=another"]).directory.glob("*/seed0"))


def test_a_run_that_did_not_converge_is_not_fine_tuned(tuned):
    _, words = tuned
    run = plan.load([*words, "name=third"]).runs[0]
    run.log_dir.mkdir(parents=True)
    (run.log_dir / plan.SUMMARY).write_text(json.dumps({"val_loss": math.nan, "steps": 4}))
    assert run.left_to_tune() == []
    assert results.read_run(run).status == "diverged"
