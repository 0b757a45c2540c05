"""The task's loss and metrics, computed from logits in the same way for every method.

The model's own `outputs.loss` is not used: PEFT's AdaLoRA adds its penalty to it, in evaluation
too. A regulariser is an explicit term here and takes part in training only.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dynlora.errors import NonFiniteError

Penalty = Callable[[], Float[Tensor, ""]]
"""A regulariser of the weights as they are now."""


class TaskLoss(TrainerCallback):
    """Cross-entropy of a batch; a callback too, so that a NaN can be reported with its step."""

    def __init__(self, penalty: Penalty | None = None) -> None:
        """Take the regulariser to add in training, if any."""
        self.penalty = penalty
        self.step = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how many optimizer steps were taken."""
        self.step = state.global_step

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean loss over the examples of one optimizer step.

        Args:
            outputs: The model's output, with `logits` of shape ``(batch, classes)``.
            labels: Classes of shape ``(batch,)``.
            num_items_in_batch: Examples in all batches of the step; None means in this batch.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        total = cross_entropy(outputs.logits.float(), labels, reduction="sum")
        loss: Tensor = total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        if self.penalty is not None and torch.is_grad_enabled():
            loss = loss + self.penalty()
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the loss must be finite, got {loss.item()} after {self.step} optimizer steps: "
                "lower `training.learning_rate`, or set `training.bf16: false` if it overflowed."
            )
        return loss


def task_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy, F1 (macro for three or more classes) and Matthews' correlation.

    Args:
        prediction: Logits of shape ``(examples, classes)`` and their labels.
    """
    logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    guesses = logits.argmax(axis=-1)
    average = "binary" if logits.shape[-1] == 2 else "macro"
    with warnings.catch_warnings():
        # A validation split of one class is the user's choice; its correlation is 0.
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        matthews = float(matthews_corrcoef(labels, guesses))
    return {
        "accuracy": float(accuracy_score(labels, guesses)),
        "f1": float(f1_score(labels, guesses, average=average, zero_division=0.0)),
        "matthews": matthews,
    }
