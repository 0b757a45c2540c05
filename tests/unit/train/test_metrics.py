"""The task's loss and metrics, against formulas written here."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, TrainerControl, TrainerState, TrainingArguments

from dynlora.errors import NonFiniteError
from dynlora.train.metrics import TaskLoss, task_metrics


def predict(labels: list[int], guesses: list[int], classes: int = 2) -> dict[str, float]:
    logits = np.eye(classes, dtype=np.float32)[guesses]
    return task_metrics(EvalPrediction(predictions=logits, label_ids=np.array(labels)))


def test_binary_metrics_follow_from_the_four_counts() -> None:
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


def test_with_three_classes_f1_is_the_mean_over_classes() -> None:
    found = predict([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], classes=3)
    assert found["f1"] == pytest.approx((1 / 2 + 4 / 5 + 2 / 3) / 3)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert -1 <= found["matthews"] <= 1


@pytest.mark.parametrize(("labels", "guesses"), [([0, 0], [0, 0]), ([1, 1], [0, 0]), ([1], [1])])
def test_a_single_class_gives_numbers_and_no_warning(labels: list[int], guesses: list[int]) -> None:
    assert all(math.isfinite(value) for value in predict(labels, guesses).values())


LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
LABELS = torch.tensor([0, 0, 1])
EACH = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(2)]


def test_the_loss_is_the_mean_cross_entropy() -> None:
    loss = TaskLoss()(SimpleNamespace(logits=LOGITS), LABELS)
    assert float(loss) == pytest.approx(sum(EACH) / 3)


def test_accumulated_batches_of_different_sizes_add_up_to_the_mean_over_all() -> None:
    task = TaskLoss()
    parts = [
        task(SimpleNamespace(logits=LOGITS[rows]), LABELS[rows], torch.tensor(3))
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert float(sum(parts)) == pytest.approx(sum(EACH) / 3)


def test_half_precision_logits_are_widened() -> None:
    loss = TaskLoss()(SimpleNamespace(logits=LOGITS.bfloat16()), LABELS)
    assert loss.dtype == torch.float32


def test_the_models_own_loss_is_never_read() -> None:
    outputs = SimpleNamespace(logits=LOGITS, loss=torch.tensor(99.0))
    assert float(TaskLoss()(outputs, LABELS)) == pytest.approx(sum(EACH) / 3)


def test_a_penalty_is_part_of_training_and_never_of_evaluation() -> None:
    task = TaskLoss(lambda: torch.tensor(5.0))
    outputs = SimpleNamespace(logits=LOGITS)
    assert float(task(outputs, LABELS)) == pytest.approx(sum(EACH) / 3 + 5)
    with torch.no_grad():
        assert float(task(outputs, LABELS)) == pytest.approx(sum(EACH) / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_reported_with_its_step(
    tmp_path: object, value: float
) -> None:
    task = TaskLoss()
    state = TrainerState(global_step=41)
    task.on_step_begin(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
    logits = torch.tensor([[0.0, value], [0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(NonFiniteError, match=r"got (nan|inf) after 41 optimizer steps"):
        task(SimpleNamespace(logits=logits), LABELS)
