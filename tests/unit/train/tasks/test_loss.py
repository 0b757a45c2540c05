"""Each task's loss, against formulas written here."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from dynlora.errors import NonFiniteError
from dynlora.train.loss import TaskLoss, summed_binary, summed_cross_entropy, summed_squares

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
LABELS = torch.tensor([0, 0, 1])
EACH = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(2)]


def test_the_loss_is_the_mean_cross_entropy() -> None:
    loss = TaskLoss(summed_cross_entropy)(SimpleNamespace(logits=LOGITS), LABELS)
    assert float(loss) == pytest.approx(sum(EACH) / 3)


def test_accumulated_batches_of_different_sizes_add_up_to_the_mean_over_all() -> None:
    task = TaskLoss(summed_cross_entropy)
    parts = [
        task(SimpleNamespace(logits=LOGITS[rows]), LABELS[rows], torch.tensor(3))
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert float(sum(parts)) == pytest.approx(sum(EACH) / 3)


def test_the_models_own_loss_is_never_read() -> None:
    outputs = SimpleNamespace(logits=LOGITS, loss=torch.tensor(99.0))
    assert float(TaskLoss(summed_cross_entropy)(outputs, LABELS)) == pytest.approx(sum(EACH) / 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_reported_with_its_step(
    tmp_path: object, value: float
) -> None:
    task = TaskLoss(summed_cross_entropy)
    state = TrainerState(global_step=41)
    task.on_step_begin(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
    logits = torch.tensor([[0.0, value], [0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(NonFiniteError, match=r"got (nan|inf) after 41 optimizer steps"):
        task(SimpleNamespace(logits=logits), LABELS)


def test_labels_of_minus_100_do_not_count() -> None:
    logits, labels = torch.stack([LOGITS, LOGITS]), torch.tensor([[0, -100, 1], [-100, 0, -100]])
    found = TaskLoss(summed_cross_entropy)(SimpleNamespace(logits=logits), labels)
    assert float(found) == pytest.approx((EACH[0] + EACH[2] + EACH[1]) / 3)


def test_the_loss_of_numbers_is_the_mean_squared_error() -> None:
    outputs, labels = torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([0.0, 4.0, 0.5])
    loss = TaskLoss(summed_squares)(SimpleNamespace(logits=outputs), labels)
    assert float(loss) == pytest.approx((1 + 4 + 0) / 3)
    parts = [
        TaskLoss(summed_squares)(SimpleNamespace(logits=outputs[rows]), labels[rows], 3)
        for rows in (slice(0, 2), slice(2, 3))
    ]
    assert float(sum(parts)) == pytest.approx((1 + 4 + 0) / 3)


def test_the_loss_of_many_classes_is_the_mean_binary_cross_entropy() -> None:
    logits, labels = torch.tensor([[2.0, -1.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    each = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1)), math.log(2)]
    each.append(math.log(1 + math.exp(3)))
    loss = TaskLoss(summed_binary)(SimpleNamespace(logits=logits), labels)
    assert float(loss) == pytest.approx(sum(each) / 4)
