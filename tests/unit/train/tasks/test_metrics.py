"""Each task's loss and metrics, against formulas written here."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, TrainingArguments

from dynlora.errors import NonFiniteError
from dynlora.train.tasks.metrics import (
    classification_metrics,
    embedding_metrics,
    multi_label_metrics,
    regression_metrics,
    summed_binary,
    summed_cross_entropy,
    summed_squares,
    token_metrics,
)
from dynlora.train.tasks.sequence import mean_of_tokens
from dynlora.train.trainer import EpochSampler, JobTrainer, mean_loss


def of(metrics, predictions, labels):
    return metrics(EvalPrediction(predictions=np.array(predictions), label_ids=np.array(labels)))


def of_classes(labels, guesses, classes=2):
    return of(classification_metrics, np.eye(classes)[guesses], labels)


def test_binary_metrics_follow_from_the_four_counts():
    # True positives, false positives, false negatives and true negatives: 2, 1, 1 and 4.
    expected = {
        "accuracy": 6 / 8,
        "f1": 2 * 2 / (2 * 2 + 1 + 1),
        "matthews": (2 * 4 - 1 * 1) / math.sqrt((2 + 1) * (2 + 1) * (4 + 1) * (4 + 1)),
    }
    found = of_classes([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0])
    assert found == pytest.approx(expected)


def test_with_three_classes_f1_is_the_mean_over_classes():
    found = of_classes([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], classes=3)
    assert found["f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    assert found["accuracy"] == pytest.approx(4 / 6)


def test_regression_metrics_follow_from_sums_of_products():
    # Means 4 and 3.5; deviations (-3, -2, 0, 5) and (-1.5, -2.5, 1.5, 2.5).
    pearson = (4.5 + 5 + 0 + 12.5) / math.sqrt((9 + 4 + 0 + 25) * (2.25 + 6.25 + 2.25 + 6.25))
    # Ranks (1, 2, 3, 4) and (2, 1, 3, 4): 1 - 6 * sum(d^2) / (n * (n^2 - 1)).
    spearman = 1 - 6 * 2 / (4 * 15)
    expected = {"pearson": pearson, "spearman": spearman, "rmse": math.sqrt((1 + 1 + 1 + 9) / 4)}
    found = of(regression_metrics, [[2.0], [1.0], [5.0], [6.0]], [1.0, 2.0, 4.0, 9.0])
    assert found == pytest.approx(expected)


def test_multi_label_metrics_follow_from_the_counts_of_each_class():
    labels = [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    guesses = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]])
    # True positives, false positives and false negatives: (2, 1, 0), (1, 0, 1) and (0, 0, 1).
    expected = {
        "micro_f1": 2 * 3 / (2 * 3 + 1 + 2),
        "macro_f1": (4 / 5 + 2 / 3 + 0) / 3,
        "exact_match": 1 / 4,
    }
    assert of(multi_label_metrics, guesses * 4.0 - 2, labels) == pytest.approx(expected)


def test_token_metrics_follow_from_labelled_tokens_alone():
    label_ids = np.array([[0, -100, 2, 1], [2, 2, -100, -100]])
    guesses = np.array([[0, 1, 2, 0], [2, 0, -1, -1]])
    logits = np.full((2, 4, 3), -100.0, dtype=np.float32)  # as the Trainer pads them
    for row, column in zip(*np.nonzero(guesses >= 0), strict=True):
        logits[row, column] = 0
        logits[row, column, guesses[row, column]] = 2
    # True positives, false positives and false negatives: (1, 2, 0), (0, 0, 1) and (2, 0, 1).
    expected = {"accuracy": 3 / 5, "macro_f1": (2 / 4 + 0 + 4 / 5) / 3}
    assert of(token_metrics, logits, label_ids) == pytest.approx(expected)


def test_padding_has_no_part_in_the_mean():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, -100.0]]])
    assert mean_of_tokens(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]


def test_r2_is_the_explained_part_of_the_variance_and_cosine_the_mean_over_rows():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -2.0]])
    half = of(embedding_metrics, vectors / 2, vectors)
    assert half == pytest.approx({"r2": 0.75, "cosine": 1.0})
    turned = of(embedding_metrics, vectors[:, ::-1], vectors)
    assert turned == pytest.approx({"r2": 1 - 20 / 10, "cosine": 0.0})


def test_data_without_variation_gives_numbers_and_no_warning():
    for labels, guesses in (([0, 0], [0, 0]), ([1, 1], [0, 0]), ([1], [1])):
        assert all(map(math.isfinite, of_classes(labels, guesses).values()))
    for labels, guesses, rmse in (([1, 1], [0, 2], 1), ([0, 2], [1, 1], 1), ([3], [1], 2)):
        found = of(regression_metrics, np.array(guesses)[:, None], labels)
        assert found == {"pearson": 0.0, "spearman": 0.0, "rmse": rmse}
    nothing = of(multi_label_metrics, -np.ones((2, 3)), np.zeros((2, 3)))
    assert nothing == {"micro_f1": 0.0, "macro_f1": 0.0, "exact_match": 1.0}
    assert of(embedding_metrics, np.zeros((3, 2)), np.ones((3, 2))) == {"r2": 0.0, "cosine": 0.0}


LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
LABELS = torch.tensor([0, 0, 1])
EACH = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(2)]
EACH_BINARY = [math.log(1 + math.exp(x)) for x in (-2, -1, 0, 3)]
SEVERAL = torch.tensor([[2.0, -1.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
NUMBERS = torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([0.0, 4.0, 0.5])
TOKENS = torch.stack([LOGITS, LOGITS]), torch.tensor([[0, -100, 1], [-100, 0, -100]])


@pytest.mark.parametrize(
    ("summed", "given", "expected"),
    [
        (summed_cross_entropy, (LOGITS, LABELS), sum(EACH) / 3),
        (summed_cross_entropy, TOKENS, sum(EACH) / 3),
        (summed_squares, NUMBERS, (1 + 4 + 0) / 3),
        (summed_binary, SEVERAL, sum(EACH_BINARY) / 4),
    ],
)
def test_the_loss_is_the_mean_over_labels_also_in_parts(summed, given, expected):
    task, (logits, labels) = mean_loss(summed), given
    outputs = SimpleNamespace(logits=logits, loss=torch.tensor(99.0))  # the model's own, unused
    assert float(task(outputs, labels)) == pytest.approx(expected)
    count = torch.tensor(int((labels != -100).sum()))
    parts = [
        task(SimpleNamespace(logits=logits[rows]), labels[rows], count)
        for rows in (slice(0, 1), slice(1, None))
    ]
    assert float(sum(parts)) == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_reported_with_its_step(tmp_path, value):
    trainer = JobTrainer(
        sampler=EpochSampler([1], batch_size=None, seed=0),
        penalty=None,
        model=torch.nn.Linear(1, 1),
        args=TrainingArguments(output_dir=str(tmp_path), report_to="none"),
        compute_loss_func=mean_loss(summed_cross_entropy),
    )
    trainer.state.global_step = 41
    logits = torch.tensor([[0.0, value], [0.0, 0.0], [0.0, 0.0]])
    trainer.model.forward = lambda: SimpleNamespace(logits=logits)
    with pytest.raises(NonFiniteError, match=r"got (nan|inf) after 41 optimizer steps"):
        trainer.compute_loss(trainer.model, {"labels": LABELS})
