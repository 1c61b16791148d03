"""``slope eval``: checkpoints side by side, as tables and JSON; and by lm-eval where it is."""

from __future__ import annotations

import copy
import csv
import importlib.util
import json
import logging
import math
import subprocess
import sys

import pytest
import torch

import slope
from slope.cli import main
from slope.data.tokenizer import EOS, LoadedTokenizer, train_bpe
from slope.evaluation.table import Measurement, to_csv, to_markdown
from slope.evaluation.tasks import PAPER, run_tasks, task_names
from slope.export import save_dense

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
GENERATE = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: examples.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
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
    command = ["eval", "sparse", "dense", "--data", "text.txt", "--stride", "16"]
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
    assert {(row["window"], row["stride"], row["fewshot"]) for row in rows} == {("32", "16", "")}
    document = json.loads((here / "table.json").read_text())
    assert document["results"][0]["metric"] == "perplexity"
    assert document["failed"] is None
    assert main([*command, "--output", "table.md"]) == 1
    assert "'table.md' exists; give another name, or type --force" in capsys.readouterr().err
    assert main([*command, "--output", "table.md", "--force"]) == 0


@pytest.fixture
def short(here, tokenizer):
    """A folder with a model of half the others' context."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "vocab_size": 288}
    save_dense(GPT2LMHeadModel(GPT2Config(**sizes)), "short", tokenizer)
    return "short"


def test_a_checkpoint_that_does_not_fit_is_found_before_any_is_measured(
    here, short, capsys, monkeypatch
):
    from slope.evaluation import heldout

    monkeypatch.setattr(heldout, "score", lambda *args, **options: pytest.fail("measured"))
    command = ["eval", "sparse", short, "--data", "text.txt", "--window", "32"]
    assert main([*command, "--output", "table.md"]) == 1
    said = capsys.readouterr()
    assert (
        "short on 'text.txt': a window of 32 tokens must be at least 2 and at most 16" in said.err
    )
    assert not said.out
    assert not (here / "table.md").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RuntimeError("out of memory"), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_what_was_measured_is_kept_when_a_later_checkpoint_fails(
    here, capsys, monkeypatch, error, code, message
):
    from slope.evaluation import heldout

    score, calls = heldout.score, []

    def fails_later(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise error
        return score(*args, **options)

    monkeypatch.setattr(heldout, "score", fails_later)
    (here / "other.txt").write_text("the king and the war " * 20)
    outputs = [part for end in ("md", "csv", "json") for part in ("--output", f"table.{end}")]
    data = ["--data", "text.txt", "--data", "other.txt"]
    assert main(["eval", "sparse", "dense", *data, *outputs]) == code
    said = capsys.readouterr()
    assert f"slope: error: {message}" in said.err
    assert said.out == (here / "table.md").read_text()
    assert "| data | metric | sparse | dense |" in said.out
    assert said.out.splitlines()[-1].startswith(f"Incomplete: dense failed: {message}")
    with (here / "table.csv").open(newline="") as file:
        rows = [(row["model"], row["data"]) for row in csv.DictReader(file)]
    kept = [("sparse", "text.txt"), ("sparse", "other.txt"), ("dense", "text.txt")]
    assert list(dict.fromkeys(rows)) == kept
    document = json.loads((here / "table.json").read_text())
    assert document["failed"]["checkpoint"] == "dense"
    assert message in document["failed"]["error"]


def test_nothing_is_written_when_the_first_checkpoint_fails(here, capsys, monkeypatch):
    from slope.evaluation import heldout

    def fails(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(heldout, "score", fails)
    command = ["eval", "sparse", "dense", "--data", "text.txt", "--output", "table.md"]
    assert main(command) == 1
    assert not capsys.readouterr().out
    assert not (here / "table.md").exists()


def test_a_table_of_what_not_every_model_has():
    measured = [
        Measurement("a|b", "x.txt", "loss", 1.5, None, 10, window=8, stride=4),
        Measurement("other", "task", "acc", 0.5, 0.25, None, fewshot=2),
    ]
    assert to_markdown(measured, ["counted so"]) == (
        "| data | metric | a\\|b | other |\n| --- | --- | ---: | ---: |\n"
        "| x.txt | loss | 1.5000 | – |\n| task | acc | – | 0.5000 ± 0.2500 |\n\ncounted so\n"
    )
    assert to_csv(measured) == (
        "model,data,metric,value,stderr,count,window,stride,fewshot\n"
        "a|b,x.txt,loss,1.5,,10,8,4,\nother,task,acc,0.5,0.25,,,,2\n"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sparse"], 2, "give --data FILE or --tasks TASK"),
        (["--data", "text.txt"], 2, "CHECKPOINT"),
        (["sparse", "--data", "text.txt", "--stride", "0"], 2, "--stride 0 must be at least 1"),
        (["sparse", "--data", "text.txt", "--output", "a.png"], 2, "must end in one of .md, .csv"),
        (["sparse", "--data", "text.txt", "--fewshot", "0"], 2, "--fewshot goes with --tasks: "),
        (["sparse", "--data", "text.txt", "--limit", "3"], 2, "--limit goes with --tasks: "),
        (["sparse", "--tasks", "piqa", "--window", "8"], 2, "--window goes with --data: "),
        (["sparse", "--tasks", "piqa", "--stride", "8"], 2, "--stride goes with --data: "),
        (["sparse", "--tasks", "piqa", "--text-field", "a"], 2, "--text-field goes with --data: "),
        (
            ["sparse", "--data", "text.txt", "--data", "a.npy", "--text-field", "body"],
            2,
            "--text-field body goes with JSON lines or parquet, and no FILE of --data is any",
        ),
        (["sparse", "--data", "no.txt"], 1, "no file 'no.txt' to evaluate on"),
        (["nowhere", "--data", "text.txt"], 1, "no checkpoint nowhere"),
        (["sparse", "--data", "text.txt", "--window", "99"], 1, "at most 32, the model's context"),
        (["sparse", "--data", "blank.txt"], 1, "'blank.txt' holds no text to evaluate on"),
        (["sparse", "--tasks", "no.yaml"], 1, "no task file 'no.yaml'"),
        (["sparse", "--tasks", "piqa,race,piqa"], 1, "task 'piqa' is given 2 times; give it once"),
    ],
)
def test_bad_input(here, capsys, arguments, code, message):
    (here / "blank.txt").write_text("\n\n")
    assert main(["eval", *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("piqa,no.yaml", "no task file 'no.yaml'; give an existing one, or a name."),
        ("paper,piqa", "task 'piqa' is given 2 times; give it once."),
    ],
)
def test_wrong_task_names_are_found_before_torch_is_imported(here, tasks, message):
    program = (
        "import sys; from slope.cli import main; code = main(sys.argv[1:]);"
        "print(code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, "eval", "sparse", "--tasks", tasks],
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert run.stdout == "1 []\n"
    assert run.stderr == f"slope: error: {message}\n"


def test_task_names_are_spelt_out_and_files_known_by_where_they_lie(here):
    assert task_names(["boolq", "paper"]) == ["boolq", *PAPER]
    (here / "mine.yaml").touch()
    assert task_names(["mine.yaml"]) == ["mine.yaml"]
    with pytest.raises(ValueError, match=r"task '\./mine\.yaml' is given 2 times; give it once\."):
        task_names(["./mine.yaml", "mine.yaml"])


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
def test_how_tasks_were_counted_is_said_in_every_table(task_files, here, short, capsys):
    from lm_eval import __version__

    by = f"by lm-eval {__version__}"
    command = ["eval", "sparse", "dense", "--tasks", task_files, "--output", "table.csv"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"choice: 25 examples, 0-shot, {by}.", "", f"rolling: 25 examples, 0-shot, {by}.",
    ]  # fmt: skip
    with (here / "table.csv").open(newline="") as file:
        assert {(row["window"], row["fewshot"]) for row in csv.DictReader(file)} == {("", "0")}
    options = ["--tasks", "choice.yaml", "--limit", 3, "--fewshot", 1]
    found, notes = results(capsys, "sparse", short, *options)
    counted = f"3 of 25 examples (the first 3 of each task), 1-shot, {by}; 6 of 6 requests were "
    assert notes == [
        f"choice, {name}: {counted}longer than the context of {context} tokens and lost their "
        "beginning."
        for name, context in (("sparse", 32), (short, 16))
    ]
    assert {one["fewshot"] for one in found.values()} == {1}


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_a_group_counts_its_tasks_together(task_files, here, model, tokenizer):
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    from slope.evaluation.tasks import load_tasks

    (here / "zero.yaml").write_text(
        CHOICE.format(name="zero", data="examples.jsonl") + "num_fewshot: 0\n"
    )
    tasks = {}
    for parts in load_tasks(["choice.yaml", "zero.yaml"]).values():
        tasks |= parts["tasks"]
    group = Group("pair", aggregate_metric_list=[AggMetricConfig("acc")])
    for task in tasks.values():
        group.add(task)
    loaded = {"pair": {"tasks": tasks, "groups": {"pair": group}}}

    def counting(**options):
        (done,) = run_tasks(model, tokenizer, loaded, "m", **options)
        return {one.fewshot for one in done.measured}, done.counting.partition(", by")[0]

    assert counting() == ({0}, "50 examples, 0-shot")
    limited = "10 of 50 examples (the first 5 of each task), 0-, 1-shot"
    assert counting(fewshot=1, limit=5) == ({None}, limited)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_tasks_add_nothing_to_standard_error(task_files, here, capfd):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    (here / "long.jsonl").write_text(
        json.dumps({"question": "the king and " * 40, "choices": [" war", " city"], "answer": 0})
    )
    (here / "long.yaml").write_text(CHOICE.format(name="long", data="long.jsonl"))
    try:
        assert main(["eval", "sparse", "--tasks", f"{task_files},long.yaml"]) == 0
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    said = capfd.readouterr()
    assert said.err == "sparse: tasks done\n"
    assert "long: 1 example, 0-shot, by lm-eval" in said.out
    assert "2 of 2 requests were longer than the context of 32 tokens" in said.out
    assert not [record for record in records if record.name.startswith("transformers.tokenization")]


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_tasks_before_one_that_cannot_be_done_are_kept(task_files, here, capsys):
    (here / "wide.jsonl").write_text(
        json.dumps({"question": "the", "choices": [" war", " king" * 40], "answer": 0})
    )
    (here / "wide.yaml").write_text(CHOICE.format(name="wide", data="wide.jsonl"))
    assert main(["eval", "sparse", "--tasks", "choice.yaml,wide.yaml"]) == 1
    said = capsys.readouterr()
    assert "| choice | acc |" in said.out
    message = "task 'wide' cannot be done: an answer of "
    assert f"Incomplete: sparse failed: {message}" in said.out
    assert f"slope: error: {message}" in said.err
    assert "is longer than the model's context of 32, and only questions are cut" in said.err


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_tasks_refuse_a_model_that_does_not_predict_the_next_token(
    task_files, here, capsys, tokenizer
):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    save_dense(BertForMaskedLM(BertConfig(**sizes, vocab_size=288)), "bert", tokenizer)
    assert main(["eval", "sparse", "bert", "--tasks", task_files]) == 1
    said = capsys.readouterr()
    assert "tasks need a causal language model, and 'bert' holds a BertForMaskedLM." in said.err
    assert "tasks done" not in said.err


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_prompts_to_continue_are_counted(task_files, here, capsys):
    (here / "words.yaml").write_text(GENERATE)
    _, (note,) = results(capsys, "sparse", "--tasks", "words.yaml", "--limit", 4)
    assert "; 4 of 4 requests were longer than the context of 32 tokens" in note


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_bad_tasks(task_files, here, capsys, monkeypatch):
    def refused(tasks, message):
        assert main(["eval", "sparse", "--tasks", tasks]) == 1
        assert message in capsys.readouterr().err

    (here / "same.yaml").write_text((here / "choice.yaml").read_text())
    refused("choice.yaml,same.yaml", "task 'choice' is given 2 times")
    (here / "moved.yaml").write_text(CHOICE.format(name="moved", data="moved.jsonl"))
    refused("moved.yaml", "task file 'moved.yaml' cannot be used (FileNotFoundError")
    (here / "empty.yaml").write_text("output_type: multiple_choice\n")
    refused("empty.yaml", "task file 'empty.yaml' cannot be used")

    import datasets
    import lm_eval.tasks

    everything = lm_eval.tasks.TaskManager()  # reading all names takes seconds
    assert set(PAPER) <= set(everything.all_tasks)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: everything)
    refused("hellaswagg", "unknown task 'hellaswagg'; did you mean 'hellaswag'? Give a name")
    refused("PIQA", "unknown task 'PIQA'; did you mean 'piqa'?")
    refused(
        "nosuch", "unknown task 'nosuch'. Give a name of lm-eval (`lm-eval ls tasks` lists them)"
    )

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
