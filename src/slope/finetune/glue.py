"""The tasks of GLUE (arXiv 1804.07461): official TSV folders, or the hub; metrics; predictions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slope.data.files import read_utf8
from slope.finetune import metrics
from slope.finetune.config import Settings
from slope.finetune.features import Feature, WordPieces
from slope.finetune.hub import load_hub
from slope.finetune.metrics import Array

log = logging.getLogger(__name__)

_ENTAILMENT = ("entailment", "not_entailment")
_STSB_RANGE = (0.0, 5.0)


class Example(NamedTuple):
    """One or two sentences; the label is a class, or STS-B's number."""

    sentences: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class _Format:
    """Of one task.

    Attributes:
        folder: of the official download.
        sentences: columns of the sentences.
        label: column of the label.
        labels: texts of the classes in the model's order; None: a number.
        metrics: official metrics; the score is their mean.
        evaluations: suffix of the metrics' names -> split.
        columns: of a file without a line of names.
        ragged: the official file has broken lines; they are left out.
        hub_sentences: their names on the hub, where they differ.
    """

    folder: str
    sentences: tuple[str, ...]
    label: str = "label"
    labels: tuple[str, ...] | None = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    evaluations: tuple[tuple[str, str], ...] = (("", "dev"),)
    columns: tuple[str, ...] | None = None
    ragged: bool = False
    hub_sentences: tuple[str, ...] | None = None


_FORMATS = {
    "cola": _Format(
        "CoLA",
        ("sentence",),
        metrics=("matthews",),
        columns=("source", "label", "judgment", "sentence"),
    ),
    "sst2": _Format("SST-2", ("sentence",)),
    "mrpc": _Format(
        "MRPC",
        ("#1 String", "#2 String"),
        label="Quality",
        metrics=("f1", "accuracy"),
        hub_sentences=("sentence1", "sentence2"),
    ),
    "stsb": _Format(
        "STS-B",
        ("sentence1", "sentence2"),
        label="score",
        labels=None,
        metrics=("pearson", "spearman"),
    ),
    "qqp": _Format(
        "QQP",
        ("question1", "question2"),
        label="is_duplicate",
        metrics=("f1", "accuracy"),
        ragged=True,
    ),
    "rte": _Format("RTE", ("sentence1", "sentence2"), labels=_ENTAILMENT),
    "mnli": _Format(
        "MNLI",
        ("sentence1", "sentence2"),
        label="gold_label",
        labels=("contradiction", "entailment", "neutral"),
        evaluations=(("_matched", "dev_matched"), ("_mismatched", "dev_mismatched")),
        hub_sentences=("premise", "hypothesis"),
    ),
    "qnli": _Format("QNLI", ("question", "sentence"), labels=_ENTAILMENT),
}


class GlueTask:
    """One task of GLUE with its examples.

    Args:
        settings: of the run.

    Attributes:
        head: class of transformers that gets the encoder.
        outputs: of that head; 1 is a regression.

    Raises:
        FileNotFoundError: if a split is missing.
        ValueError: if a file is not in the official format, with its line.
        RuntimeError: if the hub cannot be reached.
    """

    head = "BertForSequenceClassification"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.task.partition("/")[2]
        self.format = _FORMATS[self.name]
        self.outputs = len(self.format.labels or ("score",))
        splits = ["train", *(split for _, split in self.format.evaluations)]
        if settings.data == "hub":
            data = load_hub("nyu-mll/glue", self.name)
            self.examples = {split: list(_from_hub(data, split, self.format)) for split in splits}
        else:
            folder = _folder(Path(settings.data), self.format)
            self.examples = {
                split: list(_read(folder / f"{split}.tsv", self.format)) for split in splits
            }

    def content(self) -> object:
        """What was read, of which the scores are a function."""
        return self.examples

    def features(self, pieces: WordPieces) -> tuple[list[Feature], dict[str, list[Feature]]]:
        """What the model is trained on, and what is evaluated, by split."""
        made = {
            split: _features(examples, pieces, self.settings.max_length)
            for split, examples in self.examples.items()
        }
        train = made.pop("train")
        return train, {
            split: [feature._replace(targets={}) for feature in features]
            for split, features in made.items()
        }

    def score(self, outputs: Mapping[str, Sequence[Array]]) -> dict[str, float]:
        """Metrics in percent from the head's outputs of each example; ``score`` is their mean."""
        found = {}
        for suffix, split in self.format.evaluations:
            predicted = self._predicted(outputs[split])
            labels = np.array([example.label for example in self.examples[split]])
            for name in self.format.metrics:
                found[name + suffix] = getattr(metrics, name)(predicted, labels)
        return found | {"score": float(np.mean(list(found.values())))}

    def predictions(self, outputs: Mapping[str, Sequence[Array]]) -> dict[str, str]:
        """Files in the layout of a GLUE submission: name -> text."""
        files = {}
        for split, values in outputs.items():
            labels = self.format.labels
            texts = [
                labels[value] if labels else f"{value:.3f}" for value in self._predicted(values)
            ]
            rows = [f"{index}\t{text}\n" for index, text in enumerate(texts)]
            files[f"{split}.tsv"] = "index\tprediction\n" + "".join(rows)
        return files

    def _predicted(self, outputs: Sequence[Array]) -> Array:
        table = np.stack(outputs)
        return table.argmax(1) if self.format.labels else table[:, 0]


def _folder(data: Path, form: _Format) -> Path:
    if not data.is_dir():
        raise FileNotFoundError(
            f"there is no folder '{data}'; type data=<the official {form.folder} folder>, or "
            "data=hub."
        )
    inside = data / form.folder
    folder = inside if inside.is_dir() else data
    for split in ("train", *(split for _, split in form.evaluations)):
        if not (folder / f"{split}.tsv").is_file():
            found = ", ".join(sorted(path.name for path in folder.glob("*"))) or "nothing"
            raise FileNotFoundError(
                f"'{folder}' has no {split}.tsv (found: {found}); type data=<the official "
                f"{form.folder} folder>, or data=hub."
            )
    return folder


def _read(path: Path, form: _Format) -> Iterator[Example]:
    """The examples of one official file."""
    names: Sequence[str] | None = form.columns
    broken: list[int] = []
    count = 0
    # Lines end in \n alone: some sentences hold other separators.
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if names is None:
            names = cells
            _check_names(path, number, names, form)
        elif len(cells) == len(names):
            try:
                yield _example(dict(zip(names, cells, strict=True)), form)
            except ValueError as error:
                hint = f" {_layout(form)}" if form.columns and number == 1 else ""
                raise ValueError(f"'{path}' line {number}: {error}{hint}") from error
            count += 1
        elif form.ragged:
            broken.append(number)
        else:
            raise ValueError(
                f"'{path}' line {number}: {len(cells)} columns, not the {len(names)} of "
                f"{form.folder} ({', '.join(names)}); separate them by one tab."
            )
    if broken:
        log.warning("%s: %d broken lines left out, the first is %d.", path, len(broken), broken[0])
    if not count:
        raise ValueError(f"'{path}' has no examples; is the download complete?")


def _check_names(path: Path, number: int, names: Sequence[str], form: _Format) -> None:
    wrong = [name for name in (*form.sentences, form.label) if names.count(name) != 1]
    if wrong:
        raise ValueError(
            f"'{path}' line {number}: needs one column {' and one '.join(map(repr, wrong))}, and "
            f"its columns are {', '.join(map(repr, names))}. {_layout(form)}"
        )


def _layout(form: _Format) -> str:
    """What to write instead."""
    names = ", ".join(form.columns or (*form.sentences, form.label))
    first = "no line of names, and" if form.columns else "a line of names, among them"
    return f"The official {form.folder} file has {first} the columns {names}, one tab between two."


def _example(row: Mapping[str, str], form: _Format) -> Example:
    text = row[form.label]
    sentences = tuple(row[name] for name in form.sentences)
    if form.labels is not None:
        if text not in form.labels:
            raise ValueError(
                f"{form.label} is {text!r}, none of {', '.join(form.labels)}; correct it."
            )
        return Example(sentences, form.labels.index(text))
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    least, most = _STSB_RANGE
    if not least <= value <= most:
        raise ValueError(
            f"{form.label} is {text!r}, no number from {least:g} to {most:g}; correct it."
        )
    return Example(sentences, value)


def _from_hub(data: Any, split: str, form: _Format) -> Iterator[Example]:
    rows = data[split.replace("dev", "validation")]
    classes: Any = getattr(rows.features["label"], "names", None)
    for row in rows:
        sentences = tuple(row[name] for name in form.hub_sentences or form.sentences)
        label = row["label"]
        if form.labels is not None and form.labels != ("0", "1"):
            label = form.labels.index(classes[label])  # the hub counts them in another order
        yield Example(sentences, label)


def _features(examples: Sequence[Example], pieces: WordPieces, max_length: int) -> list[Feature]:
    columns = list(zip(*(example.sentences for example in examples), strict=True))
    encoded = [[encoding.ids for encoding in pieces.encode(column)] for column in columns]
    made = []
    for example, *texts in zip(examples, *encoded, strict=True):
        first, second = texts[0], texts[1] if len(texts) == 2 else None
        _cut(first, second, max_length)
        made.append(pieces.join(first, second, {"labels": example.label}))
    return made


def _cut(first: list[int], second: list[int] | None, max_length: int) -> None:
    """Cut the end of the longer text, in place, until all fits with the special tokens."""
    room = max_length - (2 if second is None else 3)
    while len(first) + len(second or ()) > room:
        longer = first if second is None or len(first) > len(second) else second
        longer.pop()
