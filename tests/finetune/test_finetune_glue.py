"""GLUE's official files, the hub's rows, and the inputs made of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tiny_bert import VOCABULARY, chosen, write_sst2, write_vocabulary

from slope.finetune.config import TASKS
from slope.finetune.features import load_word_pieces
from slope.finetune.glue import GlueTask

MNLI = (
    "index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
    "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1",
)  # fmt: skip
# task -> (line of names or None, row with first and second sentence, label; labels; metrics)
OFFICIAL = {
    "cola": (None, "gj04\t{2}\t\t{0}", ("0", "1"), ("matthews",)),
    "sst2": ("sentence\tlabel", "{0}\t{2}", ("0", "1"), ("accuracy",)),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{2}\t7\t8\t{0}\t{1}",
        ("0", "1"),
        ("f1", "accuracy"),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t1\tnone\tnone\t{0}\t{1}\t{2}",
        ("0.000", "4.750"),
        ("pearson", "spearman"),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "3\t4\t5\t{0}\t{1}\t{2}",
        ("0", "1"),
        ("f1", "accuracy"),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        "0\t{0}\t{1}\t{2}",
        ("entailment", "not_entailment"),
        ("accuracy",),
    ),
    "mnli": (
        "\t".join((*MNLI, "gold_label")),
        "\t".join(["x"] * 8 + ["{0}", "{1}", "neutral", "{2}"]),
        ("contradiction", "entailment", "neutral"),
        ("accuracy_matched", "accuracy_mismatched"),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "0\t{0}\t{1}\t{2}",
        ("entailment", "not_entailment"),
        ("accuracy",),
    ),
}


def write(folder, name):
    names, row, labels, _ = OFFICIAL[name]
    folder.mkdir()
    for split in ("train", "dev") if name != "mnli" else ("train", "dev_matched", "dev_mismatched"):
        rows = [row.format('a "film', "the town", label) for label in labels]
        text = "\n".join(([names] if names else []) + rows) + "\n"
        (folder / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


def task(name, data):
    return GlueTask(chosen(f"task=glue/{name}", "init_from=x", f"data={data}"))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_are_read(name, tmp_path):
    labels = OFFICIAL[name][2]
    found = task(name, write(tmp_path / "data", name))
    examples = found.examples["train"]
    # A lone quote is a character like any other.
    assert examples[0].sentences[0] == 'a "film'
    assert all(len(e.sentences) == 1 or e.sentences[1] == "the town" for e in examples)
    numbers = [0.0, 4.75] if name == "stsb" else list(range(len(labels)))
    assert [example.label for example in examples] == numbers
    assert found.outputs == (1 if name == "stsb" else len(labels))


@pytest.mark.parametrize("name", OFFICIAL)
def test_right_predictions_score_100_and_are_written_as_a_submission(name, tmp_path):
    labels, metrics = OFFICIAL[name][2:]
    found = task(name, write(tmp_path / "data", name))
    rows = [np.array([0.1]), np.array([4.0])] if name == "stsb" else list(np.eye(len(labels)))
    outputs = {split: rows for split in found.examples if split != "train"}
    assert found.score(outputs) == {name: pytest.approx(100) for name in (*metrics, "score")}
    first = next(iter(found.predictions(outputs).values())).splitlines()
    assert first[0] == "index\tprediction"
    texts = ("0.100", "4.000") if name == "stsb" else labels
    assert first[1:] == [f"{index}\t{text}" for index, text in enumerate(texts)]


def test_every_task_is_tested():
    assert {f"glue/{name}" for name in OFFICIAL} | {"squad"} == set(TASKS)


def test_a_folder_of_the_whole_download_will_do(tmp_path):
    write_sst2(tmp_path / "SST-2", train=4, dev=2)
    assert len(task("sst2", tmp_path).examples["train"]) == 4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sst2", "text\tlabel\ngood\t1\n", "line 1: needs one column 'sentence', and its columns "
         "are 'text', 'label'. The official SST-2 file has a line of names, among them the"),
        ("sst2", "sentence,label\ngood,1\n", "columns are 'sentence,label'.* one tab between two"),
        ("sst2", "label\tlabel\tsentence\n1\t1\tgood\n", "line 1: needs one column 'label'"),
        ("sst2", "sentence\tlabel\ngood\t1\nbad\n", r"line 3: 1 columns, not the 2 of SST-2"),
        ("sst2", "sentence\tlabel\ngood\t2\n", "line 2: label is '2', none of 0, 1"),
        ("sst2", "sentence\tlabel\n", "has no examples"),
        ("cola", "gj04\t1\t\n", "line 1: 3 columns, not the 4 of CoLA"),
        ("cola", "source\tlabel\tjudgment\tsentence\n", "line 1: label is 'label', none of 0, 1; "
         "correct it. The official CoLA file has no line of names"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tyes\n", "line 2: label is 'yes'"),
        ("stsb", OFFICIAL["stsb"][0] + "\n" + OFFICIAL["stsb"][1].format("a", "b", "5.5"),
         "line 2: score is '5.5', no number from 0 to 5"),
        ("stsb", OFFICIAL["stsb"][0] + "\n" + OFFICIAL["stsb"][1].format("a", "b", "much"),
         "score is 'much'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_its_line(name, text, message, tmp_path):
    folder = write(tmp_path / "data", name)
    (folder / "dev.tsv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{folder}/dev.tsv")) as caught:
        task(name, folder)
    assert re.search(message, str(caught.value))


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    folder = write(tmp_path / "data", "sst2")
    (folder / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    with pytest.raises(ValueError, match=r"dev.tsv' line 2: not UTF-8 text .* convert it"):
        task("sst2", folder)


def test_a_missing_split_is_named_with_what_is_there(tmp_path):
    folder = write(tmp_path / "data", "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no dev_mismatched.tsv \(found: dev_matched.tsv, train.tsv\)"
    ):
        task("mnli", folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*glue'; type data=<the off"):
        task("sst2", tmp_path / "glue")


def test_empty_lines_are_no_examples(tmp_path):
    folder = write(tmp_path / "data", "sst2")
    (folder / "dev.tsv").write_text("sentence\tlabel\n\ngood\t1\r\n\n")
    assert task("sst2", folder).examples["dev"] == [(("good",), 1)]


def test_broken_lines_of_qqp_are_left_out_and_said(tmp_path, caplog):
    folder = write(tmp_path / "data", "qqp")
    with open(folder / "dev.tsv", "a") as file:
        file.write("4\t5\n")
    assert len(task("qqp", folder).examples["dev"]) == 2
    assert "1 broken lines left out, the first is 4" in caplog.text


def hub(monkeypatch, splits, names):
    import datasets

    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=names),
    )
    made = {
        split: datasets.Dataset.from_dict(
            {"premise": ["a"] * 3, "hypothesis": ["b"] * 3, "label": [0, 1, 2]}, features
        )
        for split in splits
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: made)


def test_the_hub_counts_the_classes_of_mnli_in_another_order(monkeypatch):
    splits = ("train", "validation_matched", "validation_mismatched")
    hub(monkeypatch, splits, ["entailment", "neutral", "contradiction"])
    found = task("mnli", "hub")
    assert [example.label for example in found.examples["dev_matched"]] == [1, 2, 0]
    assert found.examples["train"][0].sentences == ("a", "b")


def test_without_the_hub_a_folder_is_asked_for(monkeypatch):
    import datasets

    def refuse(path, name):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        RuntimeError, match=r"'nyu-mll/glue' cannot be had .* \(ConnectionError: no route\).*data="
    ):
        task("rte", "hub")


def test_pairs_get_special_tokens_and_the_longer_text_is_cut(tmp_path):
    pieces = load_word_pieces(str(write_vocabulary(tmp_path)), "x")
    folder = tmp_path / "data"
    folder.mkdir()
    text = "index\tsentence1\tsentence2\tlabel\n0\tThe film was very good.\ta story\tentailment\n"
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(text)
    settings = chosen("task=glue/rte", "init_from=x", f"data={folder}", "max_length=8")
    train, evaluations = GlueTask(settings).features(pieces)
    tokens = [VOCABULARY[i] for i in train[0].input_ids]
    assert tokens == ["[CLS]", "the", "film", "was", "[SEP]", "a", "story", "[SEP]"]
    assert train[0].second == 5
    assert (train[0].targets, evaluations["dev"][0].targets) == ({"labels": 0}, {})


def test_a_batch_is_padded_to_a_multiple_of_8(tmp_path):
    pieces = load_word_pieces(str(write_vocabulary(tmp_path)), "x")
    features = [pieces.join([5], None, {"labels": 1}), pieces.join([5, 6], [7] * 6, {"labels": 0})]
    batch = pieces.collate(features)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum(1).tolist() == [3, 11]
    assert batch["token_type_ids"].sum(1).tolist() == [0, 7]
    assert (batch["input_ids"][0, 3:] == pieces.pad).all()
    assert torch.equal(batch["labels"], torch.tensor([1, 0]))
