"""GLUE's and SQuAD's metrics against values worked out by hand, and against other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn
from torchmetrics.functional.text import squad as torchmetrics_squad

from slope.finetune import metrics

# 3 true positives, 4 true negatives, 1 false positive, 2 false negatives
LABELS = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
PREDICTED = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])


def test_accuracy_is_the_share_of_right_predictions():
    assert metrics.accuracy(PREDICTED, LABELS) == pytest.approx(70)


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    precision, recall = 3 / 4, 3 / 5
    assert metrics.f1(PREDICTED, LABELS) == pytest.approx(
        100 * 2 * precision * recall / (precision + recall)
    )
    assert metrics.f1(np.zeros(10), LABELS) == 0


def test_matthews_is_its_formula():
    tp, tn, fp, fn = 3, 4, 1, 2
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.matthews(PREDICTED, LABELS) == pytest.approx(100 * expected)


def test_matthews_of_a_constant_prediction_is_0_as_in_scikit_learn():
    assert metrics.matthews(np.ones(10), LABELS) == 0


def test_pearson_and_spearman_are_the_correlations_of_values_and_ranks():
    x, y = np.array([0.0, 1, 2, 2, 3]), np.array([1.0, 0, 2, 4, 5])
    # after centring: sums of x y, x x and y y
    assert metrics.pearson(x, y) == pytest.approx(100 * 7.8 / math.sqrt(5.2 * 17.2))
    # the same of the ranks 1, 2, 3.5, 3.5, 5 and 2, 1, 3, 4, 5
    assert metrics.spearman(x, y) == pytest.approx(100 * 8.5 / math.sqrt(9.5 * 10))


def test_spearman_sees_only_the_order():
    x = np.array([0.3, 0.1, 0.7, 0.9])
    assert metrics.spearman(x, np.exp(10 * x)) == pytest.approx(100)
    assert metrics.spearman(x, -x) == pytest.approx(-100)


def test_squad_ignores_case_articles_punctuation_and_spaces():
    found = metrics.squad({"a": "The  Eiffel Tower!"}, {"a": ["eiffel tower"]})
    assert found == {"exact_match": 100.0, "f1": 100.0}


def test_squad_counts_shared_words_of_the_best_answer():
    answers = {"a": ["Denver", "Denver Broncos won"], "b": ["10"], "c": ["gold"]}
    found = metrics.squad({"a": "the Broncos of Denver", "b": "10"}, answers)
    # a: broncos, of, denver against "denver broncos won": 2 shared of 3 and 3, F1 2/3, better than
    # 1/2 against "denver"; b: right; c: not answered
    assert found["exact_match"] == pytest.approx(100 / 3)
    assert found["f1"] == pytest.approx(100 * (2 / 3 + 1) / 3)


@pytest.mark.parametrize(
    ("predicted", "answer", "exact"),
    [("The", "a", 100), ("", "the", 100), ("...", "", 100), ("an", "AN", 100), ("the", "x", 0)],
)
def test_two_texts_without_a_word_share_none_in_version_1(predicted, answer, exact):
    # Version 2.0 gives an F1 of 100 here, for questions without an answer.
    found = metrics.squad({"q": predicted}, {"q": [answer]})
    assert found == {"exact_match": exact, "f1": 0}


def test_a_question_that_was_not_answered_is_wrong():
    assert metrics.squad({}, {"q": ["..."]}) == {"exact_match": 0, "f1": 0}


WORD = st.sampled_from(
    ["the", "a", "Rome", "rome", "1905", "was", "u.s.", "it's", "x", "\u00e9t\u00e9"]
)
TEXT = (
    st.lists(WORD, min_size=1, max_size=6)
    .map(" ".join)
    .filter(lambda text: any(word not in ("the", "a") for word in text.split()))
)


@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_squad_is_that_of_torchmetrics_where_both_sides_have_words(pairs):
    predictions = {str(number): text for number, (text, _) in enumerate(pairs)}
    answers = {str(number): texts for number, (_, texts) in enumerate(pairs)}
    other = torchmetrics_squad(
        [{"id": key, "prediction_text": text} for key, text in predictions.items()],
        [{"id": key, "answers": {"text": texts}} for key, texts in answers.items()],
    )
    found = metrics.squad(predictions, answers)
    assert found == pytest.approx({key: float(value) for key, value in other.items()}, rel=1e-5)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_accuracy_f1_and_matthews_are_those_of_scikit_learn(pairs):
    predicted, labels = (np.array(side, dtype=int) for side in zip(*pairs, strict=True))
    labels[:2] = 0, 1  # of one class alone scikit-learn warns
    assert metrics.accuracy(predicted, labels) == pytest.approx(
        100 * sklearn.accuracy_score(labels, predicted)
    )
    assert metrics.f1(predicted, labels) == pytest.approx(
        100 * sklearn.f1_score(labels, predicted, zero_division=0)
    )
    assert metrics.matthews(predicted, labels) == pytest.approx(
        100 * sklearn.matthews_corrcoef(labels, predicted)
    )


@given(st.integers(0, 2**32 - 1), st.integers(3, 40))
def test_pearson_and_spearman_are_those_of_scipy(seed, count):
    draw = np.random.default_rng(seed)
    x, y = draw.normal(size=count), draw.integers(0, 5, count).astype(float)
    y[:2] = 0, 1  # not constant
    assert metrics.pearson(x, y) == pytest.approx(100 * stats.pearsonr(x, y).statistic)
    assert metrics.spearman(x, y) == pytest.approx(100 * stats.spearmanr(x, y).statistic)
