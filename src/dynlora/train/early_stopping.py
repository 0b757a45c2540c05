"""Early stopping computed from the log, so that resumed runs stop at the same step.

transformers' `EarlyStoppingCallback` keeps its own counter, and trains on after a resume from the
checkpoint at which it stopped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora.report.wording import lower_is_better


class EarlyStopping(TrainerCallback):
    """Stops training after a number of consecutive evaluations without improvement."""

    def __init__(self, metric: str, patience: int) -> None:
        """Store the validation metric, and the number of evaluations without improvement."""
        self.metric = metric
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop training if `is_over`."""
        control.should_training_stop |= self.is_over(state.log_history)

    def is_over(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the last `patience` evaluations of a log brought no improvement.

        Args:
            log: The Trainer's log since training began.
        """
        key = f"eval_{self.metric}"
        sign = -1.0 if lower_is_better(self.metric) else 1.0
        values = [sign * line[key] for line in log if key in line]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience
