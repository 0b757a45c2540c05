"""Resume a run whose training is complete, without another step.

The Trainer checks only after a step whether to stop, so from a checkpoint inside an epoch it would
train one step more.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora.train.trainer import EpochSampler


class HeldRun(TrainerCallback):
    """Makes the resumed epoch empty, and the last one."""

    def __init__(self, sampler: EpochSampler) -> None:
        """Close the sampler."""
        sampler.closed = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop training after this epoch."""
        control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skip logging, evaluation and saving, which were done before the checkpoint."""
        control.should_log = control.should_evaluate = control.should_save = False
