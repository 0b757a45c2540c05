"""A resumed run whose training is over: it loads its checkpoint and takes no step.

Left to itself the Trainer takes one more wherever the checkpoint is inside an epoch: it asks only
after a step whether it is time to stop.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora.train.trainer import EpochSampler


class HeldRun(TrainerCallback):
    """Makes the epoch that training goes on in the last one, and an empty one."""

    def __init__(self, sampler: EpochSampler) -> None:
        """Let no more examples come."""
        sampler.closed = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the epoch the last one, if none was to come."""
        control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what was done when the checkpoint was written."""
        control.should_log = control.should_evaluate = control.should_save = False
