"""What a job is about to do: said before training, and all that `--dry-run` prints."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What was loaded, and what comes of it."""

    task: str
    method: str
    train_rows: int
    validation_rows: int
    num_labels: int | None
    """Outputs of the model's head; None where the task has none."""
    start_parameters: int
    """Parameters in use at the start."""
    budget: int
    """Parameters that the method may use."""
    steps: int
    """Optimizer steps of the whole run."""
    resumes_from_step: int | None
    """Steps already taken; None where the run starts afresh."""
    output: Path
    """Folder of the run."""
    replaces_run: bool
    """Whether `output` holds a run that would be replaced."""

    def lines(self) -> Iterator[str]:
        """Yield what was loaded and will be trained, a line each."""
        labels = "" if self.num_labels is None else f", {_plural(self.num_labels, 'output')}"
        rows = f"{self.train_rows:,} training and {self.validation_rows:,} validation rows"
        yield f"data: {rows}{labels}"
        trained = "LoRA parameters" if self.method != "full" else "parameters, all of the model's"
        steps = _plural(self.steps, "step")
        yield f"method {self.method}: {self.start_parameters:,} {trained}; {steps}"

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return asdict(self) | {"output": str(self.output)}

    def text(self, metrics: Mapping[str, float]) -> str:
        """Return all of it for people.

        Args:
            metrics: Validation metrics before training.
        """
        past = self.resumes_from_step
        start = "" if past is None else f", going on from step {past}"
        instead = ", replacing the run there" if self.replaces_run else ""
        measured = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        return "\n".join(
            (
                *self.lines(),
                f"validation before training: {measured}",
                f"would train and write to {self.output}{start}{instead}; "
                "nothing was written (--dry-run)",
            )
        )


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"
