"""SQuAD v1.1 (arXiv 1606.05250): its JSON, windows over long contexts, best spans.

A context that does not fit is read in windows that begin ``doc_stride`` word pieces apart. A span
may begin only where its window shows most of the context around that piece, so that a piece in two
windows counts once; over all windows of a question the span of the largest start + end wins.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from slope.data.files import read_utf8
from slope.finetune import metrics
from slope.finetune.config import Settings
from slope.finetune.features import Feature, WordPieces
from slope.finetune.hub import load_hub
from slope.finetune.metrics import Array

FILES = {"train": "train-v1.1.json", "dev": "dev-v1.1.json"}
_SLACK = 2  # characters that an `answer_start` may be off, as a few in circulation are
_SHOWN = 60  # characters of a wrong value in an error
_LAYOUT = (
    "SQuAD v1.1 is {data: [{paragraphs: [{context, qas: [{id, question, answers: [{text, "
    "answer_start}]}]}]}]}."
)
_Place: TypeAlias = tuple[str | int, ...]


class Question(NamedTuple):
    """A question on a context.

    Attributes:
        id: its name.
        question: its text.
        context: what holds the answer.
        answers: right answers, parts of the context.
        start: first character of the first answer.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class Window:
    """Where an input came from.

    Attributes:
        question: its index.
        before: word pieces before those of the context.
        offsets: characters (begin, end) of each piece of the context.
        mine: (pieces,) bool, whether no other window shows more around the piece.
    """

    question: int
    before: int
    offsets: Sequence[tuple[int, int]]
    mine: Array


class SquadTask:
    """SQuAD v1.1 with its questions.

    Args:
        settings: of the run.

    Attributes:
        head: class of transformers that gets the encoder.
        outputs: of that head, per word piece.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not SQuAD v1.1, with its line.
        RuntimeError: if the hub cannot be reached.
    """

    head = "BertForQuestionAnswering"
    outputs = 2

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.questions: dict[str, list[Question]] = {}
        if settings.data == "hub":
            data = load_hub("rajpurkar/squad")
            for split, name in (("train", "train"), ("dev", "validation")):
                self.questions[split] = [_from_hub(row) for row in data[name]]
        else:
            paths = {split: Path(settings.data) / name for split, name in FILES.items()}
            for path in paths.values():
                if not path.is_file():
                    raise FileNotFoundError(
                        f"there is no '{path}'; type data=<folder with "
                        f"{' and '.join(FILES.values())}>, or data=hub."
                    )
            self.questions = {split: list(read(path)) for split, path in paths.items()}
        self.windows: list[Window] = []

    def content(self) -> object:
        """What was read, of which the scores are a function."""
        return self.questions

    def features(self, pieces: WordPieces) -> tuple[list[Feature], dict[str, list[Feature]]]:
        """What the model is trained on, and what is evaluated, by split."""
        train = list(_windows(self.questions["train"], pieces, self.settings, train=True))
        dev = list(_windows(self.questions["dev"], pieces, self.settings, train=False))
        self.windows = [window for _, window in dev]
        return [feature for feature, _ in train], {"dev": [feature for feature, _ in dev]}

    def score(self, outputs: Mapping[str, Sequence[Array]]) -> dict[str, float]:
        """Exact match and F1 in percent; ``score`` is F1."""
        answers = {question.id: question.answers for question in self.questions["dev"]}
        found = metrics.squad(self.answers(outputs["dev"]), answers)
        return found | {"score": found["f1"]}

    def predictions(self, outputs: Mapping[str, Sequence[Array]]) -> dict[str, str]:
        """The file that the official evaluation script reads: name -> text."""
        answers = self.answers(outputs["dev"])
        return {"predictions.json": json.dumps(answers, ensure_ascii=False, indent=1) + "\n"}

    def answers(self, outputs: Sequence[Array]) -> dict[str, str]:
        """The best answer to each question.

        Args:
            outputs: per window (2, length): scores of each piece as start and as end.
        """
        questions = self.questions["dev"]
        best = {question.id: (-np.inf, "") for question in questions}
        for window, (start, end) in zip(self.windows, outputs, strict=True):
            question = questions[window.question]
            inside = slice(window.before, window.before + len(window.offsets))
            for value, first, last in candidates(
                start[inside], end[inside], window.mine, self.settings
            ):
                if value > best[question.id][0]:
                    text = question.context[window.offsets[first][0] : window.offsets[last][1]]
                    best[question.id] = (value, text)
        return {key: text for key, (_, text) in best.items()}


class _Wrong(ValueError):
    """What is wrong in a JSON document, and at which keys and indices it stands."""

    def __init__(self, place: _Place, message: str) -> None:
        super().__init__(message)
        self.place = place


def read(path: Path) -> Iterator[Question]:
    """The questions of an official file.

    Raises:
        ValueError: if it is no SQuAD v1.1, or an answer is not in its context, with the line.
    """
    text = read_utf8(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"'{path}' line {error.lineno}: no JSON ({error.msg}); is the download complete?"
        ) from error
    known: set[str] = set()
    try:
        for place, question in _questions(document):
            if question.id in known:
                raise _Wrong(
                    (*place, "id"),
                    f"question {question.id!r} is there twice; give each an id of its own.",
                )
            known.add(question.id)
            yield question
    except _Wrong as error:
        line = text.count("\n", 0, _position(text, error.place)) + 1
        raise ValueError(f"'{path}' line {line}: {error}") from error
    if not known:
        raise ValueError(f"'{path}' has no questions; is the download complete?")


def _questions(document: Any) -> Iterator[tuple[_Place, Question]]:
    for a, article in enumerate(_member(document, "data", list)):
        above: _Place = ("data", a)
        for p, paragraph in enumerate(_member(article, "paragraphs", list, above)):
            around: _Place = (*above, "paragraphs", p)
            context = _member(paragraph, "context", str, around)
            for q, asked in enumerate(_member(paragraph, "qas", list, around)):
                place = (*around, "qas", q)
                yield place, _question(asked, context, place)


def _member(parent: Any, key: str, kind: type[Any], place: _Place = ()) -> Any:
    """``parent[key]``, if it is of that kind."""
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    name = name.lstrip(".") or "the document"
    if not isinstance(parent, dict):
        raise _Wrong(place, f"{name} is {_short(parent)}, and must be an object. {_LAYOUT}")
    if key not in parent:
        raise _Wrong(place, f"{name} has no {key!r}. {_LAYOUT}")
    value = parent[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {list: "a list", str: "a text", int: "a whole number"}[kind]
        raise _Wrong(
            (*place, key), f"{key!r} of {name} is {_short(value)}, and must be {wanted}. {_LAYOUT}"
        )
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def _position(text: str, place: _Place) -> int:
    """The character of a JSON document at which the value at ``place`` begins."""
    decoder = json.JSONDecoder()

    def solid(at: int) -> int:
        while text[at].isspace():
            at += 1
        return at

    at = solid(0)
    for step in place:
        at, index = solid(at + 1), 0
        while True:
            found: Any = index
            if isinstance(step, str):
                found, at = decoder.raw_decode(text, at)
                at = solid(solid(at) + 1)  # behind the colon
            if found == step:
                break
            at = solid(solid(decoder.raw_decode(text, at)[1]) + 1)  # behind the comma
            index += 1
    return at


def _question(asked: Any, context: str, place: _Place = ()) -> Question:
    """A question whose answers are in its context.

    Args:
        asked: of the JSON document.
        context: the paragraph's.
        place: of ``asked``.
    """
    name, question = (_member(asked, key, str, place) for key in ("id", "question"))
    if not asked.get("answers"):
        raise _Wrong(
            place,
            f"question {name!r} has no answer, as in SQuAD v2.0 or a test set; v1.1 is needed.",
        )
    texts, starts = [], []
    for index, answer in enumerate(_member(asked, "answers", list, place)):
        here: _Place = (*place, "answers", index)
        text, given = _member(answer, "text", str, here), _member(answer, "answer_start", int, here)
        near = sorted(range(given - _SLACK, given + _SLACK + 1), key=lambda at: abs(at - given))
        found = [at for at in near if at >= 0 and context.startswith(text, at)]
        if not found or not text.strip():
            there = context[max(0, given) : max(0, given) + len(text)]
            raise _Wrong(
                here,
                f"answer {text!r} to question {name!r} is not in its context at character {given}, "
                f"where {there!r} stands; correct answer_start or the text.",
            )
        texts.append(text)
        starts.append(found[0])
    return Question(name, question.strip(), context, tuple(texts), starts[0])


def _from_hub(row: Mapping[str, Any]) -> Question:
    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    answers = [{"text": text, "answer_start": start} for text, start in pairs]
    return _question({**row, "answers": answers}, row["context"])


def _windows(
    questions: Sequence[Question], pieces: WordPieces, settings: Settings, train: bool
) -> Iterator[tuple[Feature, Window]]:
    asked = pieces.encode([question.question for question in questions])
    contexts = _encode_once(questions, pieces)
    for index, (question, query, context) in enumerate(
        zip(questions, asked, contexts, strict=True)
    ):
        query_ids = query.ids[: settings.max_query_length]
        room = settings.max_length - len(query_ids) - 3
        spans = window_spans(len(context.ids), room, settings.doc_stride)
        before = len(query_ids) + 2
        answer = _answer_pieces(question, context.offsets) if train else None
        for (begin, end), mine in zip(spans, most_context(spans), strict=True):
            targets = {}
            if answer is not None:
                inside = begin <= answer[0] and answer[1] < end
                # A window without the answer points to [CLS].
                first, last = (before + at - begin for at in answer) if inside else (0, 0)
                targets = {"start_positions": first, "end_positions": last}
            feature = pieces.join(query_ids, context.ids[begin:end], targets)
            yield feature, Window(index, before, context.offsets[begin:end], mine)


def _encode_once(questions: Sequence[Question], pieces: WordPieces) -> Iterator[Any]:
    """The encoded context of each question; several questions in a row share one."""
    changes = [
        at
        for at, question in enumerate(questions)
        if not at or question.context != questions[at - 1].context
    ]
    encoded = pieces.encode([questions[at].context for at in changes])
    ends = [*changes[1:], len(questions)]
    for encoding, first, last in zip(encoded, changes, ends, strict=True):
        yield from [encoding] * (last - first)


def _answer_pieces(question: Question, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and last piece of the first answer; a piece that it ends within belongs to it."""
    end = question.start + len(question.answers[0])
    touched = [at for at, (a, b) in enumerate(offsets) if b > question.start and a < end]
    return (touched[0], touched[-1]) if touched else (-1, -1)


def window_spans(length: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Windows (begin, end) of at most ``room`` pieces over ``length`` pieces, ``stride`` apart.

    Example:
        >>> window_spans(10, 4, 3)
        [(0, 4), (3, 7), (6, 10)]
    """
    last = max(0, length - room)
    step = min(stride, room)
    return [(begin, min(begin + room, length)) for begin in range(0, last + step, step)]


def most_context(spans: Sequence[tuple[int, int]]) -> list[Array]:
    """For each window, which of its pieces it shows with more around them than the others do.

    What a window shows around a piece is the smaller of the numbers of pieces left and right of it,
    and a hundredth of the window's length, to choose between equals; then the first window.
    """
    total = spans[-1][1] if spans else 0
    shown = np.full((len(spans), total), -np.inf)
    for row, (begin, end) in enumerate(spans):
        at = np.arange(begin, end)
        shown[row, begin:end] = np.minimum(at - begin, end - 1 - at) + 0.01 * (end - begin)
    best = shown.argmax(0) if spans else np.zeros(0)
    return [best[begin:end] == row for row, (begin, end) in enumerate(spans)]


def candidates(
    start: Array, end: Array, mine: Array, settings: Settings
) -> Iterable[tuple[float, int, int]]:
    """Spans (start + end, first, last) of a window that may be an answer.

    Args:
        start: (pieces,) scores.
        end: (pieces,) scores.
        mine: (pieces,) bool, where a span may begin.
        settings: ``n_best_size`` starts and ends are paired, up to ``max_answer_length`` pieces.
    """
    best = settings.n_best_size
    firsts, lasts = (np.argsort(-side, kind="stable")[:best] for side in (start, end))
    for first in firsts[mine[firsts]]:
        for last in lasts:
            if 0 <= last - first < settings.max_answer_length:
                yield float(start[first] + end[last]), int(first), int(last)
