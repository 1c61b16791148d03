"""SQuAD's file, windows over long contexts, and the best span."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from tiny_bert import VOCABULARY, chosen, squad_article, write_squad, write_vocabulary

from slope.finetune import squad
from slope.finetune.features import load_word_pieces
from slope.finetune.squad import SquadTask


def settings(folder, *overrides):
    return chosen("task=squad", "init_from=x", f"data={folder}", *overrides)


@pytest.fixture
def pieces(tmp_path):
    return load_word_pieces(str(write_vocabulary(tmp_path)), "x")


def dump(path, article):
    path.write_text(json.dumps(article, indent=1))
    return path


def test_the_official_file_is_read(tmp_path):
    found = list(squad.read(dump(tmp_path / "a.json", squad_article(3, 1))))
    assert [question.id for question in found] == ["1-0", "1-1", "1-2"]
    for question in found:
        assert question.context[question.start :].startswith(question.answers[0])


@pytest.mark.parametrize("indent", [1, None])
@pytest.mark.parametrize("escaped", [True, False])
def test_an_answer_beside_its_context_is_named_with_file_line_and_question(
    escaped, indent, tmp_path
):
    article = squad_article(3, 1)
    asked = article["data"][0]["paragraphs"][1]["qas"][0]
    asked["id"], asked["answers"][0]["text"] = "Kraków", "Atlantis"
    path = tmp_path / "a.json"
    text = json.dumps(article, indent=indent, ensure_ascii=escaped)
    path.write_text(text, encoding="utf-8")
    # The line before that of the text holds the brace of its answer.
    line = text.count("\n", 0, text.index('"Atlantis"')) or 1
    with pytest.raises(
        ValueError,
        match=rf"a\.json' line {line}: answer 'Atlantis' to question 'Kraków' is not in its conte",
    ):
        list(squad.read(path))


def test_an_answer_that_is_one_character_off_is_found(tmp_path):
    article = squad_article(1, 1)
    asked = article["data"][0]["paragraphs"][0]["qas"][0]
    start = asked["answers"][0]["answer_start"]
    asked["answers"][0]["answer_start"] = start - 1
    (question,) = squad.read(dump(tmp_path / "a.json", article))
    assert question.start == start


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: no JSON \(Expecting value\); is the download complete"),
        ('{"data": [\n}', r"line 2: no JSON .* is the download complete"),
        ('\n[{"data": []}]', r'line 2: the document is \[\{"data": \[\]\}\], and must be an obj'),
        ('{"version": 1}', r"line 1: the document has no 'data'\. SQuAD v1\.1 is \{data: \["),
        ('{"version": 1,\n "data": {"a": 1}}',
         r"""line 2: 'data' of the document is \{"a": 1\}, and must be a list\."""),
        ('{"data": []}', "has no questions; is the download complete"),
        ('{"data": [\n 3]}', r"line 2: data\[0\] is 3, and must be an object\."),
        ('{"data": [{"title": "x"}]}', r"line 1: data\[0\] has no 'paragraphs'\."),
        ('{"data": [{"paragraphs": []},\n {"paragraphs": "x"}]}',
         r"line 2: 'paragraphs' of data\[1\] is \"x\", and must be a list\."),
    ],
)  # fmt: skip
def test_a_wrong_file_is_an_error(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        list(squad.read(path))
    assert re.search(message, str(caught.value))


def test_a_file_that_was_cut_off_is_named_with_its_last_line(tmp_path):
    path = dump(tmp_path / "a.json", squad_article(3, 1))
    text = path.read_text()[:-200]
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"line {text.count(chr(10)) + 1}: no JSON .* complete"):
        list(squad.read(path))


ANSWER = {"text": "rome", "answer_start": 0}


@pytest.mark.parametrize(
    ("place", "value", "marked", "message"),
    [
        (["context"], None, "{", "has no 'context'"),
        (["context"], 7, '"context"', "'context' of PARAGRAPH is 7, and must be a text"),
        (["qas"], {}, '"qas"', r"'qas' of PARAGRAPH is \{\}, and must be a list"),
        (["qas", 0], "who", '"who"', r'PARAGRAPH\.qas\[0\] is "who", and must be an object'),
        (["qas", 0, "id"], None, "{", r"PARAGRAPH\.qas\[0\] has no 'id'"),
        (["qas", 0, "id"], 5, '"id"', r"'id' of PARAGRAPH\.qas\[0\] is 5, and must be a text"),
        (["qas", 0, "id"], "1-0", '"id"', "question '1-0' is there twice; give each an id of its"),
        (["qas", 0, "question"], None, "{", r"PARAGRAPH\.qas\[0\] has no 'question'"),
        (["qas", 0, "question"], ["x" * 99], '"question"', r'is \["x{58} …, and must be a text'),
        (["qas", 0, "answers"], None, "{", "question '1-1' has no answer, as in SQuAD v2.0"),
        (["qas", 0, "answers"], [], "{", "question '1-1' has no answer, as in SQuAD v2.0"),
        (["qas", 0, "answers"], ANSWER, '"answers"', "'answers' of .* and must be a list"),
        (["qas", 0, "answers", 0], "rome", '"rome"', r'answers\[0\] is "rome", and must be an obj'),
        (["qas", 0, "answers", 0, "text"], 1905, '"text"', "is 1905, and must be a text"),
        (["qas", 0, "answers", 0, "answer_start"], "4", '"answer_start"', 'is "4", and must be a'),
        (["qas", 0, "answers", 0, "answer_start"], 4.0, '"answer_start"', "is 4.0, and must be a"),
        (["qas", 0, "answers", 0, "answer_start"], True, '"answer_start"', "is true, and must be"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_paragraph_is_named_with_its_line(
    place, value, marked, message, tmp_path
):
    article = squad_article(3, 1)
    parent = article["data"][0]["paragraphs"][1]
    for step in place[:-1]:
        parent = parent[step]
    if value is None:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    path = dump(tmp_path / "a.json", article)
    with pytest.raises(ValueError, match=r"a\.json' line \d+: ") as caught:
        list(squad.read(path))
    assert re.search(message.replace("PARAGRAPH", r"data\[0\]\.paragraphs\[1\]"), str(caught.value))
    line = int(re.search(r"line (\d+)", str(caught.value))[1])
    assert path.read_text().splitlines()[line - 1].strip().startswith(marked)


def test_a_byte_order_mark_is_no_error_and_another_encoding_is(tmp_path):
    path = dump(tmp_path / "a.json", squad_article(1, 1))
    text = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + text)
    assert len(list(squad.read(path))) == 1
    path.write_bytes(b"{\n" + text.replace(b"Cities", b"Citi\xe9s"))
    with pytest.raises(ValueError, match=r"a\.json' line \d+: not UTF-8 text .*; convert it with"):
        list(squad.read(path))


def test_a_missing_file_is_named(tmp_path):
    folder = write_squad(tmp_path / "squad", train=1, dev=1)
    (folder / "dev-v1.1.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no '.*dev-v1\.1\.json'.*data=hub"):
        SquadTask(settings(folder))


@pytest.mark.parametrize(
    ("length", "room", "stride", "expected"),
    [
        (5, 8, 3, [(0, 5)]),
        (8, 8, 3, [(0, 8)]),
        (10, 8, 3, [(0, 8), (3, 10)]),
        (8, 4, 3, [(0, 4), (3, 7), (6, 8)]),
        (9, 4, 100, [(0, 4), (4, 8), (8, 9)]),
        (0, 4, 3, [(0, 0)]),
    ],
)
def test_windows_begin_a_stride_apart_and_end_with_the_context(length, room, stride, expected):
    assert squad.window_spans(length, room, stride) == expected


def test_each_piece_belongs_to_the_window_that_shows_most_around_it():
    mine = squad.most_context([(0, 8), (4, 12)])
    # pieces 0-11; around piece 6 the first shows 6 and 1, the second 2 and 5
    assert mine[0].tolist() == [True] * 6 + [False] * 2
    assert mine[1].tolist() == [False] * 2 + [True] * 6


def test_the_label_is_the_answer_and_cls_in_windows_without_it(tmp_path, pieces):
    folder = write_squad(tmp_path / "squad", train=4, dev=1, length=30)
    task = SquadTask(settings(folder, "max_length=20", "doc_stride=6"))
    train, _ = task.features(pieces)
    names = [question.answers[0].lower() for question in task.questions["train"]]
    labelled = [feature for feature in train if feature.targets["start_positions"]]
    assert 4 <= len(labelled) < len(train)
    for feature in labelled:
        span = feature.input_ids[
            feature.targets["start_positions"] : feature.targets["end_positions"] + 1
        ]
        assert len(span) == 1
        assert VOCABULARY[span[0]] in names
    assert all(len(feature.input_ids) <= 20 for feature in train)


def test_the_best_span_is_searched_in_the_order_of_the_sum(tmp_path):
    found = settings("x", "n_best_size=3", "max_answer_length=2")
    start = np.array([0.0, 5.0, 1.0, 4.0, 0.0])
    end = np.array([9.0, 0.0, 3.0, 0.0, 2.0])
    everywhere = np.ones(5, dtype=bool)
    spans = list(squad.candidates(start, end, everywhere, found))
    # 1-0 runs backwards, 1-4 is too long; starts 1, 3, 2 pair with ends 0, 2, 4
    assert sorted(spans, reverse=True) == [(8.0, 1, 2), (6.0, 3, 4), (4.0, 2, 2)]
    mine = np.array([True, False, True, True, True])
    assert (8.0, 1, 2) not in squad.candidates(start, end, mine, found)


def test_the_best_window_answers_with_the_text_of_the_context(tmp_path, pieces):
    folder = write_squad(tmp_path / "squad", train=1, dev=3, length=30)
    task = SquadTask(settings(folder, "max_length=20", "doc_stride=6"))
    _, evaluations = task.features(pieces)
    outputs = []
    for window, feature in zip(task.windows, evaluations["dev"], strict=True):
        question = task.questions["dev"][window.question]
        scores = np.zeros((2, len(feature.input_ids)), dtype=np.float32)
        for at, (begin, _) in enumerate(window.offsets):
            scores[:, window.before + at] = 5.0 if begin == question.start else 0.0
        scores[:, 0] = 50.0  # [CLS] is no part of the context, so no answer
        outputs.append(scores)
    assert len(outputs) > 3
    expected = {question.id: question.answers[0] for question in task.questions["dev"]}
    assert task.answers(outputs) == expected
    assert task.score({"dev": outputs}) == {"exact_match": 100, "f1": 100, "score": 100}
    assert json.loads(task.predictions({"dev": outputs})["predictions.json"]) == expected


def test_the_hub_is_read_by_name(monkeypatch):
    import datasets

    row = {
        "id": "q", "title": "t", "context": "It is Oslo.", "question": "What city?",
        "answers": {"text": ["Oslo"], "answer_start": [6]},
    }  # fmt: skip
    asked = []
    data = datasets.Dataset.from_list([row])

    def load(path, name):
        asked.append(path)
        return {"train": data, "validation": data}

    monkeypatch.setattr(datasets, "load_dataset", load)
    task = SquadTask(settings("hub"))
    assert asked == ["rajpurkar/squad"]
    assert task.questions["dev"][0].answers == ("Oslo",)
