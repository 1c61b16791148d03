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


def test_an_answer_beside_its_context_is_named_with_file_line_and_question(tmp_path):
    article = squad_article(3, 1)
    article["data"][0]["paragraphs"][1]["qas"][0]["answers"][0]["text"] = "Atlantis"
    path = dump(tmp_path / "a.json", article)
    lines = path.read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if '"1-1"' in text)
    with pytest.raises(
        ValueError,
        match=rf"a\.json' line {line}, question '1-1': answer 'Atlantis' is not in its context at",
    ):
        list(squad.read(path))


@pytest.mark.parametrize("escaped", [True, False])
def test_the_line_of_an_id_beyond_ascii_is_found(escaped, tmp_path):
    article = squad_article(2, 1)
    asked = article["data"][0]["paragraphs"][1]["qas"][0]
    asked["id"], asked["answers"][0]["text"] = "Kraków", "Atlantis"
    path = tmp_path / "a.json"
    text = json.dumps(article, indent=1, ensure_ascii=escaped)
    path.write_text(text, encoding="utf-8")
    line = 1 + text.splitlines().index(
        f'       "id": {json.dumps("Kraków", ensure_ascii=escaped)},'
    )
    with pytest.raises(ValueError, match=rf"line {line}, question 'Kraków': answer 'Atlantis'"):
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
        ('{"data": [\n}', "line 2: no JSON .* is the download complete"),
        ('{"version": 1}', "line 1: no SQuAD v1.1 file: a JSON object with a list 'data'"),
        ('{"data": []}', "has no questions"),
        ('{"data": [{"title": "x"}]}', r"KeyError: 'paragraphs' after 0 questions"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas":\n [{"id": "q", "question": "b", '
         '"answers": []}]}]}]}', "line 2, question 'q': it has no answer, as SQuAD v2.0 allows"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_an_error(text, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        list(squad.read(path))
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 5}, r"question 5: its id is 5, and must be a text"),
        ({"question": None}, "question '1-1': its question is null, and must be a text"),
        ({"answers": None}, "it has no list of answers"),
        (
            {"answers": [{"text": "rome", "answer_start": "x"}]},
            'answer is {"text": "rome", "answer_',
        ),
        ({"answers": [{"text": 1905, "answer_start": 0}]}, '{"text": 1905, .* must be a text with'),
        ({"id": "1-0"}, "question '1-0': the id is there twice; give each question an id of its"),
    ],
)
def test_a_wrong_question_is_named_with_its_line(change, message, tmp_path):
    article = squad_article(3, 1)
    asked = article["data"][0]["paragraphs"][1]["qas"][0]
    asked |= change
    path = dump(tmp_path / "a.json", article)
    text = path.read_text()
    line = text.count("\n", 0, text.rindex(f'"id": {json.dumps(asked["id"])}')) + 1
    with pytest.raises(ValueError, match=rf"a\.json' line {line}, question") as caught:
        list(squad.read(path))
    assert re.search(message, str(caught.value))


def test_a_question_without_an_id_is_found_by_its_text(tmp_path):
    article = squad_article(1, 1)
    del article["data"][0]["paragraphs"][0]["qas"][0]["id"]
    with pytest.raises(ValueError, match=r"line \d+, question 'What city\?': its id is null, and"):
        list(squad.read(dump(tmp_path / "a.json", article)))


def test_a_context_that_is_no_text_is_named(tmp_path):
    article = squad_article(1, 1)
    article["data"][0]["paragraphs"][0]["context"] = 7
    with pytest.raises(
        ValueError, match=r"line \d+, question '1-0': its context is 7, and must be"
    ):
        list(squad.read(dump(tmp_path / "a.json", article)))


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
