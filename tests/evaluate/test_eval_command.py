"""``slope eval``: checkpoints side by side, as tables and JSON; and by lm-eval where it is."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import math

import pytest
import torch

import slope
from slope.cli import main
from slope.data.tokenizer import EOS, LoadedTokenizer, train_bpe
from slope.evaluation.table import Measurement, to_csv, to_markdown

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(
    not HAS_LM_EVAL, reason='lm-eval is not installed: pip install "slope-llm[eval]"'
)
CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def results(capsys, *arguments):
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {(r["model"], r["data"], r["metric"]): r for r in said["results"]}
    return found, said["notes"]


def test_perplexity_of_several_checkpoints(here, capsys, model, tokenizer):
    found, notes = results(capsys, "sparse", "dense", "--data", "text.txt", "--stride", 8)
    ids = tokenizer((here / "text.txt").read_text(), verbose=False)["input_ids"]
    one, other = (found[name, "text.txt", "perplexity"] for name in ("sparse", "dense"))
    assert one["count"] == len(ids) - 1
    assert one["value"] == pytest.approx(other["value"], rel=1e-4)
    assert one["stderr"] > 0
    loss = found["sparse", "text.txt", "loss"]
    assert one["value"] == pytest.approx(math.exp(loss["value"]))
    bits = found["sparse", "text.txt", "bits_per_byte"]["value"]
    size = (here / "text.txt").stat().st_size
    assert bits == pytest.approx(loss["value"] * len(ids) / size / math.log(2))
    # Both tokenise alike, so that it is said once.
    assert notes == [
        f"text.txt: {len(ids):,} tokens in 1 document; windows of "
        f"32, 8 apart; {len(ids) - 1:,} tokens predicted, each once, after the first window from "
        "at least 24 tokens of context."
    ]


def test_files_of_one_name_and_checkpoints_that_tokenise_differently(here, capsys, model):
    backend = train_bpe([(here / "text.txt").read_text()[::-1]], 270)
    slope.save_pretrained(model, "other", LoadedTokenizer(backend, EOS).to_transformers(32))
    for folder in ("a", "b"):
        (here / folder).mkdir()
        (here / folder / "val.txt").write_text(f"the {folder} king " * 30)
    data = ["--data", "a/val.txt", "--data", "b/val.txt"]
    found, notes = results(capsys, "sparse", "other", *data)
    assert {name for _, name, _ in found} == {"a/val.txt", "b/val.txt"}
    assert [note.partition(":")[0] for note in notes[:2]] == [
        "a/val.txt, sparse", "a/val.txt, other",
    ]  # fmt: skip
    assert notes[2] == (
        "a/val.txt was counted in different ways: compare bits_per_byte of the same text, not loss "
        "or perplexity."
    )
    assert main(["eval", "sparse", *data, "--data", "a/../a/val.txt"]) == 1
    assert "'a/val.txt' is given 2 times; give it once" in capsys.readouterr().err


def test_a_checkpoint_that_is_no_number_gives_null(here, capsys, model, tokenizer):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = math.nan
    slope.save_pretrained(broken, "broken", tokenizer)
    found, _ = results(capsys, "broken", "--data", "text.txt")
    assert [(r["value"], r["stderr"]) for r in found.values()] == [(None, None)] * 3
    assert main(["eval", "broken", "--data", "text.txt"]) == 0
    assert "| text.txt | loss | nan |" in capsys.readouterr().out


def test_folded_and_cast(here, capsys):
    sparse, _ = results(capsys, "sparse", "--data", "text.txt")
    folded, _ = results(capsys, "sparse", "--data", "text.txt", "--fold", "--dtype", "bfloat16")
    key = ("sparse", "text.txt", "loss")
    assert folded[key]["value"] != sparse[key]["value"]
    assert folded[key]["value"] == pytest.approx(sparse[key]["value"], rel=0.02)


def test_tables_are_written_and_kept(here, capsys):
    command = ["eval", "sparse", "dense", "--data", "text.txt"]
    outputs = ["--output", "table.md", "--output", "table.csv", "--output", "table.json"]
    assert main([*command, *outputs]) == 0
    shown = capsys.readouterr().out
    assert shown == (here / "table.md").read_text()
    head, rule, first, *_ = shown.splitlines()
    assert (head, rule) == ("| data | metric | sparse | dense |", "| --- | --- | ---: | ---: |")
    assert first.startswith("| text.txt | perplexity | ") and first.count(" ± ") == 2
    with (here / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["sparse"] * 3 + ["dense"] * 3
    assert json.loads((here / "table.json").read_text())["results"][0]["metric"] == "perplexity"
    assert main([*command, "--output", "table.md"]) == 1
    assert "'table.md' exists; give another name, or type --force" in capsys.readouterr().err
    assert main([*command, "--output", "table.md", "--force"]) == 0


def test_a_table_of_what_not_every_model_has():
    measured = [
        Measurement("a|b", "x.txt", "loss", 1.5, None, 10),
        Measurement("other", "task", "acc", 0.5, 0.25, None),
    ]
    assert to_markdown(measured, ["counted so"]) == (
        "| data | metric | a\\|b | other |\n| --- | --- | ---: | ---: |\n"
        "| x.txt | loss | 1.5000 | – |\n| task | acc | – | 0.5000 ± 0.2500 |\n\ncounted so\n"
    )
    assert to_csv(measured) == (
        "model,data,metric,value,stderr,count\na|b,x.txt,loss,1.5,,10\nother,task,acc,0.5,0.25,\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sparse"], 2, "give --data FILE or --tasks TASK"),
        (["--data", "text.txt"], 2, "CHECKPOINT"),
        (["sparse", "--data", "text.txt", "--stride", "0"], 2, "--stride 0 must be at least 1"),
        (["sparse", "--data", "text.txt", "--output", "a.png"], 2, "must end in one of .md, .csv"),
        (["sparse", "--data", "no.txt"], 1, "no file 'no.txt' to evaluate on"),
        (["nowhere", "--data", "text.txt"], 1, "no checkpoint nowhere"),
        (["sparse", "--data", "text.txt", "--window", "99"], 1, "at most 32, the model's context"),
        (["sparse", "--data", "blank.txt"], 1, "'blank.txt' holds no text to evaluate on"),
        (["sparse", "--tasks", "no.yaml"], 1, "no task file 'no.yaml'"),
    ],
)
def test_bad_input(here, capsys, arguments, code, message):
    (here / "blank.txt").write_text("\n\n")
    assert main(["eval", *arguments]) == code
    assert message in capsys.readouterr().err


def test_without_lm_eval(here, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    assert main(["eval", "sparse", "--tasks", "piqa"]) == 1
    assert 'not installed; type: pip install "slope-llm[eval]"' in capsys.readouterr().err


@pytest.fixture
def task_files(here, monkeypatch):
    """Two tasks on local data: which word follows, and the likelihood of the questions."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", here / "cache")
    words = ["king", "war", "city", "river", "music"]
    examples = [
        {"question": f"the history of the {a} and the", "choices": [f" {b}", f" {c} of a"],
         "answer": (i + j) % 2}
        for i, a in enumerate(words)
        for j, (b, c) in enumerate(zip(words, reversed(words), strict=True))
    ]  # fmt: skip
    (here / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (here / f"{name}.yaml").write_text(text.format(name=name, data="examples.jsonl"))
    return "choice.yaml,rolling.yaml"


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
def test_tasks_score_sparse_as_dense_with_zeros(task_files, capsys):
    found, _ = results(capsys, "sparse", "dense", "--tasks", task_files)
    for metric in ("acc", "acc_norm"):
        one, other = (found[name, "choice", metric] for name in ("sparse", "dense"))
        assert {**one, "model": "dense"} == other
        assert 0 < one["value"] < 1
        assert one["count"] == 25
        share = one["value"]
        assert one["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 24))
    for metric in ("word_perplexity", "bits_per_byte"):
        one, other = (found[name, "rolling", metric]["value"] for name in ("sparse", "dense"))
        assert one == pytest.approx(other, rel=1e-5)
    limited, _ = results(capsys, "sparse", "--tasks", "choice.yaml", "--limit", 3)
    assert limited["sparse", "choice", "acc"]["count"] == 3


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_bad_tasks(task_files, here, capsys, monkeypatch):
    def refused(tasks, message):
        assert main(["eval", "sparse", "--tasks", tasks]) == 1
        assert message in capsys.readouterr().err

    refused("choice.yaml,choice.yaml", "task 'choice' is given 2 times")
    (here / "moved.yaml").write_text(CHOICE.format(name="moved", data="moved.jsonl"))
    refused("moved.yaml", "task file 'moved.yaml' cannot be used (FileNotFoundError")
    (here / "empty.yaml").write_text("output_type: multiple_choice\n")
    refused("empty.yaml", "task file 'empty.yaml' cannot be used")

    import datasets
    import lm_eval.tasks

    from slope.evaluation.tasks import PAPER

    everything = lm_eval.tasks.TaskManager()  # reading all names takes seconds
    assert set(PAPER) <= set(everything.all_tasks)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: everything)
    refused("hellaswagg", "unknown task 'hellaswagg'; did you mean 'hellaswag'?")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    refused("piqa", "examples of task 'piqa' cannot be had (ConnectionError: no hub)")


def test_a_model_in_memory_is_left_as_it_was(model):
    from slope.evaluation.heldout import score

    model.train()
    score(model, torch.arange(10))
    assert model.training
    model.eval()
