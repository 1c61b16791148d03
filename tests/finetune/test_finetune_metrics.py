"""GLUE's and SQuAD's metrics against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

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
