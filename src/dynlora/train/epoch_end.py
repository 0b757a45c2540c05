"""A checkpoint on an epoch's last step comes after that epoch's evaluation, and knows it."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveAfterEvaluation(TrainerCallback):
    """Puts a checkpoint off until the epoch that ends with its step was evaluated.

    The Trainer saves first: a run resumed from there would never have that evaluation, and might
    stop early at another step. Must come after whatever asks for checkpoints.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the checkpoint off, if the epoch ends here and is evaluated then."""
        ends = control.should_training_stop or float(state.epoch or 0).is_integer()
        self._is_due = control.should_save and ends and args.eval_strategy == "epoch"
        if self._is_due:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for it again; the Trainer evaluates before it saves."""
        control.should_save |= self._is_due
        self._is_due = False
