"""Output before training: the summary of `train --dry-run` and the table of `plan`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

UNMEASURED = "Peak memory: add --measure, which trains each method for two steps."
MEASURED = "Peak memory of a process that evaluated one batch and trained for two steps."
ON_CPU = (
    "With `training.bf16` on a CPU, torch also keeps a kernel per batch length and rank: a whole "
    "run then needs more memory."
)


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
        yield f"data: {_rows(self.train_rows, self.validation_rows)}{labels}"
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


def plan_table(values: Mapping[str, Any]) -> Group:
    """Return parameters and measured peak memory per method as a table with notes.

    Args:
        values: Result of `plan_job`; after a measurement also with `measured` and `not_measured`.
    """
    measured = values.get("measured")
    peaks = {"peak_memory_bytes": "peak memory"} if measured is not None else {}
    if any(peak["peak_gpu_memory_bytes"] is not None for peak in (measured or {}).values()):
        peaks["peak_gpu_memory_bytes"] = "peak GPU memory"
    table = Table("method")
    for heading in ("adapter budget", "trained parameters", "share of the model", *peaks.values()):
        table.add_column(heading, justify="right")
    for method, plan in values["methods"].items():
        table.add_row(
            method,
            "–" if method == "full" else f"{plan['budget']:,}",
            f"{plan['trainable']:,}",
            f"{plan['trainable'] / plan['total']:.2%}",
            *(_mebibytes((measured or {}).get(method), key) for key in peaks),
        )
    notes = [f"{name} is not possible: {why}" for name, why in values["impossible"].items()]
    failed = values.get("not_measured", {})
    notes += [f"{name} could not be measured: {why}" for name, why in failed.items()]
    notes.append(UNMEASURED if measured is None else MEASURED)
    if measured and len(peaks) == 1:
        notes.append(ON_CPU)
    rows = _rows(values["rows"]["train"], values["rows"]["validation"])
    overview = f"{values['task']}: {rows}, {values['steps']:,} steps"
    return Group(Text(overview), table, *map(Text, notes))


def _mebibytes(peak: Mapping[str, int] | None, key: str) -> str:
    return "–" if peak is None else f"{peak[key] / 2**20:,.0f} MiB"


def _rows(train: int, validation: int) -> str:
    return f"{train:,} training and {validation:,} validation rows"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
