"""Summary of a job before training, which is also the output of `--dry-run`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """Data, method and output folder of a job before training."""

    task: str
    method: str
    train_rows: int
    validation_rows: int
    num_labels: int | None
    """Outputs of the model's head; None for tasks without labels."""
    start_parameters: int
    """Parameters in use at the start."""
    budget: int
    """Maximum number of parameters for the method."""
    steps: int
    """Optimizer steps of the whole run."""
    resumes_from_step: int | None
    """Steps already taken; None for a new run."""
    output: Path
    """Folder of the run."""
    replaces_run: bool
    """Whether the run replaces an earlier one in `output`."""

    def lines(self) -> Iterator[str]:
        """Yield a line about the data and one about the method."""
        labels = "" if self.num_labels is None else f", {_plural(self.num_labels, 'output')}"
        rows = f"{self.train_rows:,} training and {self.validation_rows:,} validation rows"
        yield f"data: {rows}{labels}"
        trained = "LoRA parameters" if self.method != "full" else "parameters, all of the model's"
        steps = _plural(self.steps, "step")
        yield f"method {self.method}: {self.start_parameters:,} {trained}; {steps}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self) | {"output": str(self.output)}

    def text(self, metrics: Mapping[str, float]) -> str:
        """Return the text that `--dry-run` prints.

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
