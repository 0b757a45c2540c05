"""Compute the task's loss from logits, in the same way for every method.

The model's `outputs.loss` is not used, because PEFT's AdaLoRA adds its penalty to it even in
evaluation. The Trainer adds regularisers explicitly, in training only.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora.errors import NonFiniteError

Penalty = Callable[[], Float[Tensor, ""]]
"""Returns a regulariser of the current weights."""
SummedLoss = Callable[[Tensor, Tensor], Float[Tensor, ""]]
"""Returns the loss from float32 logits and labels, summed over all labels other than -100."""


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Return the cross-entropy of logits ``(..., classes)`` and labels ``(...)``."""
    flat: Tensor = logits.reshape(-1, logits.shape[-1])
    return cross_entropy(flat, labels.reshape(-1), reduction="sum", ignore_index=-100)


def summed_squares(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Return the squared error of logits ``(batch, 1)`` and numbers ``(batch,)``, or of vectors.

    Vectors are both of shape ``(batch, hidden_size)``, with a hidden size above 1.
    """
    return mse_loss(logits.squeeze(-1), labels, reduction="sum")


def summed_binary(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Return the binary cross-entropy of logits and 0/1 labels, both ``(batch, classes)``."""
    return binary_cross_entropy_with_logits(logits, labels, reduction="sum")


class TaskLoss(TrainerCallback):
    """Loss of a batch; a callback too, to report the step of a NaN."""

    def __init__(self, summed: SummedLoss) -> None:
        self.summed = summed
        self.step = 0

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Store the number of completed optimizer steps."""
        self.step = state.global_step

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean loss over the labels of one optimizer step.

        `num_items_in_batch` counts the labels other than -100 in all batches of the step; None
        counts those in this batch.
        """
        total = self.summed(outputs.logits.float(), labels)
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss: Tensor = total / count
        check_finite(loss, self.step)
        return loss


def check_finite(loss: Float[Tensor, ""], step: int) -> None:
    """Check that the loss after `step` optimizer steps is finite."""
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss must be finite, got {loss.item()} after {step} optimizer steps: "
            "lower `training.learning_rate`, or set `training.bf16: false` if it overflowed."
        )
