"""Save an epoch's last checkpoint after its evaluation, so that it contains the metrics."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveAfterEvaluation(TrainerCallback):
    """Delays a checkpoint on an epoch's last step until after the epoch's evaluation.

    The Trainer saves first, so a resumed run would miss that evaluation and could stop early at
    another step. Add this callback after all callbacks that request checkpoints.
    """

    def __init__(self) -> None:
        self._is_due = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Delay the checkpoint if the epoch ends here and is evaluated."""
        ends = control.should_training_stop or float(state.epoch or 0).is_integer()
        self._is_due = control.should_save and ends and args.eval_strategy == "epoch"
        if self._is_due:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Request the checkpoint again; the Trainer now evaluates first."""
        control.should_save |= self._is_due
        self._is_due = False
