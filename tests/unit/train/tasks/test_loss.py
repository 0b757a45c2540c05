"""Each task's loss, against formulas written here."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from dynlora.errors import NonFiniteError
from dynlora.train.tasks.metrics import summed_binary, summed_cross_entropy, summed_squares
from dynlora.train.trainer import TaskLoss

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
    task, (logits, labels) = TaskLoss(summed), given
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
    task = TaskLoss(summed_cross_entropy)
    state = TrainerState(global_step=41)
    task.on_step_begin(TrainingArguments(output_dir=str(tmp_path)), state, TrainerControl())
    logits = torch.tensor([[0.0, value], [0.0, 0.0], [0.0, 0.0]])
    with pytest.raises(NonFiniteError, match=r"got (nan|inf) after 41 optimizer steps"):
        task(SimpleNamespace(logits=logits), LABELS)
