"""Each task's metrics, against formulas written here."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from dynlora.train.tasks.metrics import (
    classification_metrics,
    embedding_metrics,
    multi_label_metrics,
    regression_metrics,
    token_metrics,
)
from dynlora.train.tasks.sequence import mean_of_tokens


def predict(labels, guesses, classes=2):
    logits = np.eye(classes, dtype=np.float32)[guesses]
    return classification_metrics(EvalPrediction(predictions=logits, label_ids=np.array(labels)))


def test_binary_metrics_follow_from_the_four_counts():
    labels, guesses = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    true_pos, false_pos, false_neg, true_neg = 2, 1, 1, 4
    root = math.sqrt(
        (true_pos + false_pos) * (true_pos + false_neg)
        * (true_neg + false_pos) * (true_neg + false_neg)
    )  # fmt: skip
    assert predict(labels, guesses) == pytest.approx(
        {
            "accuracy": 6 / 8,
            "f1": 2 * true_pos / (2 * true_pos + false_pos + false_neg),
            "matthews": (true_pos * true_neg - false_pos * false_neg) / root,
        }
    )


def test_with_three_classes_f1_is_the_mean_over_classes():
    found = predict([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], classes=3)
    assert found["f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert -1 <= found["matthews"] <= 1


@pytest.mark.parametrize(("labels", "guesses"), [([0, 0], [0, 0]), ([1, 1], [0, 0]), ([1], [1])])
def test_a_single_class_gives_numbers_and_no_warning(labels, guesses):
    assert all(math.isfinite(value) for value in predict(labels, guesses).values())


def predict_numbers(labels, guesses):
    outputs = np.array(guesses, dtype=np.float32)[:, None]
    label_ids = np.array(labels, dtype=np.float32)
    return regression_metrics(EvalPrediction(predictions=outputs, label_ids=label_ids))


def test_regression_metrics_follow_from_sums_of_products():
    labels, guesses = [1.0, 2.0, 4.0, 9.0], [2.0, 1.0, 5.0, 6.0]
    # Means 4 and 3.5; deviations (-3, -2, 0, 5) and (-1.5, -2.5, 1.5, 2.5).
    pearson = (4.5 + 5 + 0 + 12.5) / math.sqrt((9 + 4 + 0 + 25) * (2.25 + 6.25 + 2.25 + 6.25))
    # Ranks (1, 2, 3, 4) and (2, 1, 3, 4): 1 - 6 * sum(d^2) / (n * (n^2 - 1)).
    spearman = 1 - 6 * 2 / (4 * 15)
    rmse = math.sqrt((1 + 1 + 1 + 9) / 4)
    expected = {"pearson": pearson, "spearman": spearman, "rmse": rmse}
    assert predict_numbers(labels, guesses) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "guesses", "rmse"),
    [([1, 1], [0, 2], 1.0), ([0, 2], [1, 1], 1.0), ([3], [1], 2.0)],
)
def test_without_variation_there_is_no_correlation_and_no_warning(labels, guesses, rmse):
    expected = {"pearson": 0.0, "spearman": 0.0, "rmse": rmse}
    assert predict_numbers(labels, guesses) == pytest.approx(expected)


def test_multi_label_metrics_follow_from_the_counts_of_each_class():
    labels = [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    guesses = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]]
    logits = np.array(guesses, dtype=np.float32) * 4 - 2
    prediction = EvalPrediction(predictions=logits, label_ids=np.array(labels, dtype=np.float32))
    # True positives, false positives and false negatives: (2, 1, 0), (1, 0, 1) and (0, 0, 1).
    expected = {
        "micro_f1": 2 * 3 / (2 * 3 + 1 + 2),
        "macro_f1": (4 / 5 + 2 / 3 + 0) / 3,
        "exact_match": 1 / 4,
    }
    assert multi_label_metrics(prediction) == pytest.approx(expected)


def test_rows_without_any_class_give_numbers_and_no_warning():
    nothing = EvalPrediction(predictions=-np.ones((2, 3)), label_ids=np.zeros((2, 3)))
    assert multi_label_metrics(nothing) == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}


def test_token_metrics_follow_from_labelled_tokens_alone():
    label_ids = np.array([[0, -100, 2, 1], [2, 2, -100, -100]])
    guesses = np.array([[0, 1, 2, 0], [2, 0, -1, -1]])
    logits = np.full((2, 4, 3), -100.0, dtype=np.float32)  # as the Trainer pads them
    for row, column in zip(*np.nonzero(guesses >= 0), strict=True):
        logits[row, column] = 0
        logits[row, column, guesses[row, column]] = 2
    right, wrong = math.log(1 + 2 * math.exp(-2)), math.log(2 + math.exp(2))
    # True positives, false positives and false negatives: (1, 2, 0), (0, 0, 1) and (2, 0, 1).
    expected = {
        "accuracy": 3 / 5,
        "macro_f1": (2 / 4 + 0 + 4 / 5) / 3,
        "loss": (3 * right + 2 * wrong) / 5,
    }
    prediction = EvalPrediction(predictions=logits, label_ids=label_ids)
    assert token_metrics(prediction) == pytest.approx(expected)


def test_padding_has_no_part_in_the_mean():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, -100.0]]])
    assert mean_of_tokens(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]
    assert mean_of_tokens(hidden[:, :1], torch.tensor([[1]])).tolist() == [[1.0, 2.0]]


def test_r2_is_the_explained_part_of_the_variance_and_cosine_the_mean_over_rows():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -2.0]])
    half = EvalPrediction(predictions=vectors / 2, label_ids=vectors)
    assert embedding_metrics(half) == pytest.approx({"r2": 0.75, "cosine": 1.0})
    turned = EvalPrediction(predictions=vectors[:, ::-1], label_ids=vectors)
    assert embedding_metrics(turned) == pytest.approx({"r2": 1 - 20 / 10, "cosine": 0.0})


def test_vectors_without_variance_and_guesses_of_zero_have_numbers_too():
    same = EvalPrediction(predictions=np.zeros((3, 2)), label_ids=np.ones((3, 2)))
    assert embedding_metrics(same) == {"r2": 0.0, "cosine": 0.0}
