"""Early stopping, decided from the log alone: a resumed run stops where it would have stopped.

transformers' `EarlyStoppingCallback` counts in itself, and what it has decided is forgotten when a
run resumes from the very checkpoint on which it stopped.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora.report.wording import lower_is_better


class EarlyStopping(TrainerCallback):
    """Ends training after too many evaluations in a row that bring nothing better."""

    def __init__(self, metric: str, patience: int) -> None:
        """Take the validation metric, and how many evaluations may bring nothing better."""
        self.metric = metric
        self.patience = patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop if it is time."""
        control.should_training_stop |= self.is_over(state.log_history)

    def is_over(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the last `patience` evaluations of a log brought nothing better.

        Args:
            log: What the Trainer has logged since training began.
        """
        key = f"eval_{self.metric}"
        sign = -1.0 if lower_is_better(self.metric) else 1.0
        values = [sign * line[key] for line in log if key in line]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience
