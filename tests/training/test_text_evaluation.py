"""``callbacks.evaluation``: what ``slope eval`` measures, in a run that sees nothing of it."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from test_resume import kill_before_row, kill_in_micro_batch, kill_in_write
from tiny_runs import assert_equal, kill

from slope.cli import main
from slope.configs import compose
from slope.evaluation import heldout
from slope.plotting import curves
from slope.plotting.runs import read_runs
from slope.training import program
from slope.training.metrics import COLUMNS, MetricsFile
from slope.training.module import LanguageModule

KEY = "callbacks.evaluation"
WORDS = "the history of the city and the river is the music of a king and a war "
METRICS = ("perplexity", "loss", "bits_per_byte")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A text, JSON lines with another field, and token ids."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "book.txt").write_text(WORDS * 12)
    lines = [json.dumps({"body": WORDS * 3}), json.dumps({"body": WORDS})]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    np.save(folder / "ids.npy", np.arange(100, dtype=np.uint16))
    return folder


def evaluate(texts, *names, **options):
    files = ",".join(f"{texts}/{name}" for name in names)
    return [f"{KEY}.files=[{files}]", *(f"{KEY}.{name}={v}" for name, v in options.items())]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, finished, texts):
    """The run of ``finished`` with evaluations in every second step."""
    runs = type(finished)(tmp_path_factory.mktemp("evaluated"), finished.corpus)
    settings = evaluate(texts, "book.txt", "ids.npy", every_n_steps=2, stride=7, batch_size=3)
    runs.summary = runs.run("name=whole", "plot=true", *settings)
    runs.settings = settings
    return runs


def columns_of(rows):
    return [name for name in rows[0] if name.startswith("eval/")]


def evaluations(runs, name="whole"):
    rows = runs.rows(name)
    names = columns_of(rows)
    return {int(row["step"]): [row[name] for name in names] for row in rows if row[names[0]]}


# -- a run -----------------------------------------------------------------------------------------


def test_training_is_the_same_bit_for_bit(evaluated, finished):
    a, b = evaluated.last("whole"), finished.last("whole")
    for key in ("global_step", "state_dict", "optimizer_states"):
        assert_equal(a[key], b[key], key)
    assert_equal(a["slope"]["rng"], b["slope"]["rng"], "rng")
    assert evaluated.exact_rows("whole") == finished.exact_rows("whole")


@pytest.mark.parametrize(
    "settings",
    [
        ["pruner=none"],
        ["pruner.column_mask_interval=3"],
        ["pruner.evolve_interval=2"],
        ["pruner.pruned_matrix=static-input"],
        ["pruner.pruned_matrix=dynamic-output-grad"],
        ["pruner=extended-sr-ste"],
        ["pruner=fst"],
        ["pruner=s-ste"],
        ["trainer.precision=bf16-mixed"],
    ],
    ids=" ".join,
)
def test_no_method_sees_an_evaluation(runs, texts, settings):
    settings = [*settings, "trainer.max_steps=5", "trainer.val_check_interval=5"]
    runs.run("name=plain", *settings)
    runs.run("name=evaluated", *settings, *evaluate(texts, "book.txt", every_n_steps=1))
    a, b = runs.last("plain"), runs.last("evaluated")
    for key in ("state_dict", "optimizer_states"):
        assert_equal(a[key], b[key], key)
    assert len(evaluations(runs, "evaluated")) == 5


def test_mode_and_generators_are_left_alone(runs, texts, monkeypatch):
    seen, score = [], heldout.score

    def drawing(model, *args, **kwargs):
        seen.append(model.training)
        found = score(model, *args, **kwargs)
        torch.rand(1)
        seen.append(model.training)
        return found

    monkeypatch.setattr(heldout, "score", drawing)
    runs.run("name=drawing", "trainer.max_steps=4", *evaluate(texts, "book.txt", every_n_steps=1))
    monkeypatch.undo()
    runs.run("name=plain", "trainer.max_steps=4")
    assert seen == [True] * 8
    assert_equal(runs.last("drawing")["state_dict"], runs.last("plain")["state_dict"], "weights")


def test_rows_summary_and_log(evaluated):
    rows = evaluated.rows("whole")
    names = [f"eval/book.txt/{m}" for m in METRICS] + [f"eval/ids.npy/{m}" for m in METRICS[:2]]
    assert tuple(rows[0]) == (*COLUMNS, *names)
    found = evaluations(evaluated)
    assert list(found) == [2, 4, 6, 8, 10, 12]
    assert evaluated.summary | dict(zip(names, map(float, found[12]), strict=True)) == (
        evaluated.summary
    )
    logs = evaluated.root / "logs" / "whole"
    assert json.loads((logs / "summary.json").read_text()) == evaluated.summary
    text = (logs / "run.log").read_text()
    assert len(re.findall("book.txt: .* tokens in 1 document; windows of 32, 7 apart", text)) == 1
    assert len(re.findall(r"step \d+: book.txt loss \d", text)) == 6
    (run,) = read_runs([logs])
    loss, perplexity, *_ = curves.draw([run]).axes
    for panel in (loss, perplexity):
        labels = [text.get_text() for text in panel.get_legend().get_texts()]
        assert labels[:4] == ["training", "validation", "book.txt", "ids.npy"]


def test_the_numbers_are_those_of_slope_eval(evaluated, texts, capsys):
    checkpoint = str(evaluated.checkpoints("whole") / "last.ckpt")
    files = ["--data", f"{texts}/book.txt", "--data", f"{texts}/ids.npy"]
    assert main(["eval", checkpoint, *files, "--stride", "7", "--json", "--device", "cpu"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [r["metric"] for r in results] == [*METRICS, *METRICS[:2]]
    for result in results:
        column = f"eval/{result['data']}/{result['metric']}"
        assert evaluated.summary[column] == pytest.approx(result["value"], rel=1e-6)


def test_defaults_follow_validation(runs, texts):
    summary = runs.run(
        "name=defaults", "trainer.max_steps=5", *evaluate(texts, "lines.jsonl", text_field="body")
    )
    assert list(evaluations(runs, "defaults")) == [3, 5]
    loss = summary["eval/lines.jsonl/loss"]
    assert summary["eval/lines.jsonl/perplexity"] == pytest.approx(math.exp(loss))
    log = (runs.root / "logs" / "defaults" / "run.log").read_text()
    assert "tokens in 2 documents joined by the end-of-text token; windows of 32, 32 apart" in log


def test_the_loggers_get_them(runs, texts, monkeypatch):
    logged = {}

    class Logger(program.pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged[step] = metrics

    monkeypatch.setattr(program, "_logger", lambda cfg: Logger())
    runs.run("name=logged", "trainer.max_steps=3", *evaluate(texts, "book.txt"))
    assert {f"eval/book.txt/{metric}" for metric in METRICS} <= set(logged[3])
    assert "eval/book.txt/loss" not in logged[2]


# -- stopping and going on -------------------------------------------------------------------------


def kill_in_evaluation(number):
    """Die in the ``number``-th evaluation of this process."""

    def before():
        score, seen = heldout.score, [0]

        def dying(*args, **kwargs):
            seen[0] += 1
            if seen[0] == number:
                kill()
            return score(*args, **kwargs)

        heldout.score = dying

    return before


@pytest.mark.parametrize(
    "before",
    [
        kill_in_evaluation(3),
        kill_in_evaluation(11),  # of the last step
        kill_in_micro_batch(9),  # step 4 is evaluated and not saved
        kill_in_write(2),
        kill_before_row,
    ],
)
def test_no_evaluation_is_lost_or_repeated(runs, evaluated, before):
    settings = evaluated.settings
    assert runs.fork("name=whole", *settings, before=before) == -signal.SIGKILL
    assert runs.fork("name=whole", "resume=True", *settings) == 0
    assert runs.exact_rows("whole") == evaluated.exact_rows("whole")
    assert evaluations(runs) == evaluations(evaluated)
    summary = json.loads((runs.root / "logs" / "whole" / "summary.json").read_text())
    for column in columns_of(runs.rows("whole")):
        assert summary[column] == evaluated.summary[column]


def test_a_finished_run_keeps_its_last_numbers(runs, evaluated):
    shutil.copytree(evaluated.root, runs.root, dirs_exist_ok=True)
    before = (runs.root / "logs" / "whole" / "metrics.csv").read_bytes()
    summary = runs.run("name=whole", "resume=True", *evaluated.settings)
    assert (runs.root / "logs" / "whole" / "metrics.csv").read_bytes() == before
    assert summary["eval/book.txt/loss"] == evaluated.summary["eval/book.txt/loss"]


def test_other_texts_from_a_checkpoint_on(runs, evaluated, texts):
    shutil.copytree(evaluated.root, runs.root, dirs_exist_ok=True)
    lines = evaluate(texts, "lines.jsonl", text_field="body")
    runs.run("name=whole", "resume=True", "resume_iter=6", *lines)
    rows = {int(row["step"]): row for row in runs.rows("whole")}
    assert rows[6]["eval/book.txt/loss"] and not rows[6]["eval/lines.jsonl/loss"]
    assert rows[12]["eval/lines.jsonl/loss"] and not rows[12]["eval/book.txt/loss"]
    assert runs.exact_rows("whole") == evaluated.exact_rows("whole")


def test_metrics_keep_the_columns_of_other_texts(tmp_path):
    path = tmp_path / "metrics.csv"
    with MetricsFile(path, 0, (*COLUMNS, "eval/a/loss")) as metrics:
        metrics.append({"step": 1, "eval/a/loss": 2.0})
    with MetricsFile(path, 1) as metrics:
        metrics.append({"step": 2})
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["eval/a/loss"]) for row in rows] == [("1", "2.0"), ("2", "")]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "error", "text"),
    [
        ([f"{KEY}.files=[no.txt]"], FileNotFoundError, "files names 'no.txt', which is no file"),
        ([f"{KEY}.files=no.txt"], FileNotFoundError, "files names 'no.txt', which is no file"),
        ([f"{KEY}.files=[B,B]"], ValueError, "book.txt' is given 2 times; give it once"),
        ([f"{KEY}.files=[B]", f"{KEY}.every_n_steps=0"], ValueError, "steps=0 must be a whole"),
        ([f"{KEY}.files=[B]", f"{KEY}.batch_size=0"], ValueError, "size=0 must be .* least 1"),
        ([f"{KEY}.files=[B]", f"{KEY}.window=1"], ValueError, "window=1 must be .* at least 2"),
        (
            [f"{KEY}.files=[B]", f"{KEY}.window=99"],
            ValueError,
            "evaluation.window=99: a window of 99 tokens must be .* at most 32",
        ),
        (
            [f"{KEY}.files=[B]", f"{KEY}.stride=33"],
            ValueError,
            "window=32 callbacks.evaluation.stride=33: a stride of 33 tokens must be from 1",
        ),
    ],
)
def test_bad_settings_before_the_data(runs, texts, monkeypatch, overrides, error, text):
    import slope.data

    monkeypatch.setattr(slope.data, "prepare", lambda *args, **kwargs: pytest.fail("too late"))
    overrides = [o.replace("B", f"{texts}/book.txt") if ".files" in o else o for o in overrides]
    for do in (program.check, program.run):
        with pytest.raises(error, match=text):
            do(runs.config("name=bad", *overrides))


def test_a_masked_model_has_no_perplexity(runs, texts):
    settings = [f"paths.root={runs.root}", "trainer.accelerator=cpu"]
    cfg = compose(["experiment=bert/demo", *settings, *evaluate(texts, "book.txt")])
    with pytest.raises(ValueError, match=r"with a BERT model, .*; type .*\.files=\[\]"):
        program.check(cfg)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("blank.txt", b" \n \n", "blank.txt' cannot be used: '.*blank.txt' holds no text"),
        ("empty.txt", b"", f"is empty .* take it out of {KEY}.files"),
        ("a.csv", b"a,b", "unknown extension '.csv'"),
        ("other.jsonl", b'{"body": "a"}\n', f"no field 'text'.*Type {KEY}.text_field=body"),
        ("val.bin", b"nothing", "is not the train.bin or val.bin of a token cache"),
        ("large.npy", np.array([1, 60000]), "token 60000, but the tokenizer's last one is"),
        ("one.npy", np.array([1]), "1 token to evaluate on"),
    ],
)
def test_bad_files_before_the_first_step(runs, tmp_path, monkeypatch, name, content, text):
    def training_step(*args):
        pytest.fail("too late")

    monkeypatch.setattr(LanguageModule, "training_step", training_step)
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=text):
        runs.run("name=bad", f"{KEY}.files=[{path}]")
    assert not runs.checkpoints("bad").exists()  # the name stays free


def test_tokens_of_another_tokenizer(runs, tmp_path, corpus):
    from slope.data import prepare

    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"zebra {number} quilts and jazz " * 9)
    other = prepare(
        {"dataset": "text", "data_files": [f"{tmp_path}/*.txt"], "tokenizer": "bpe:270",
         "max_length": 4, "val_ratio": 0.3, "cache_dir": str(tmp_path / "cache")},
        progress=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="val.bin' was made with tokenizer .* not with the mod"):
        runs.run("name=bad", f"{KEY}.files=[{other.cache_dir}/val.bin]")
    own = prepare(runs.config().datamodule, progress=False)
    summary = runs.run(
        "name=own", "trainer.max_steps=1", "trainer.limit_val_batches=null",
        f"{KEY}.files=[{own.cache_dir}/val.bin]",
    )  # fmt: skip
    # The windows of the evaluation are the sequences of the validation, and what is left over.
    assert summary["eval/val.bin/loss"] == pytest.approx(summary["val_loss"], rel=0.02)
