"""Format a job's plan as a table: parameters and measured peak memory per method."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

MEBIBYTE = 2**20
UNMEASURED = "Peak memory: add --measure, which trains each method for two steps."
MEASURED = "Peak memory of a process that evaluated one batch and trained for two steps."
ON_CPU = (
    "With `training.bf16` on a CPU, torch also keeps a kernel per batch length and rank: a whole "
    "run then needs more memory."
)


def plan_table(values: Mapping[str, Any]) -> Group:
    """Return the plan as a table with notes.

    Args:
        values: Result of `plan_job`; after a measurement also with `measured` and `not_measured`.
    """
    measured = values.get("measured")
    peaks = {"peak_memory_bytes": "peak memory"}
    if any(peak["peak_gpu_memory_bytes"] is not None for peak in (measured or {}).values()):
        peaks["peak_gpu_memory_bytes"] = "peak GPU memory"
    rows = (
        f"{values['rows']['train']:,} training and {values['rows']['validation']:,} validation rows"
    )
    table = Table("method")
    headings = ["adapter budget", "trained parameters", "share of the model"]
    for heading in (*headings, *(peaks.values() if measured is not None else ())):
        table.add_column(heading, justify="right")
    for method, plan in values["methods"].items():
        found = [] if measured is None else [_mebibytes(measured.get(method), key) for key in peaks]
        table.add_row(
            method,
            "–" if method == "full" else f"{plan['budget']:,}",
            f"{plan['trainable']:,}",
            f"{plan['trainable'] / plan['total']:.2%}",
            *found,
        )
    notes = [f"{name} is not possible: {why}" for name, why in values["impossible"].items()]
    failed = values.get("not_measured", {})
    notes += [f"{name} could not be measured: {why}" for name, why in failed.items()]
    notes.append(UNMEASURED if measured is None else MEASURED)
    if measured and len(peaks) == 1:
        notes.append(ON_CPU)
    overview = f"{values['task']}: {rows}, {values['steps']:,} steps"
    return Group(Text(overview), table, *(Text(note) for note in notes))


def _mebibytes(peak: Mapping[str, int] | None, key: str) -> str:
    return "–" if peak is None else f"{peak[key] / MEBIBYTE:,.0f} MiB"
