"""Read a run's folder into one immutable value for reports and comparisons.

An unfinished run is read as far as its files go; `notes` list the missing parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.errors import RunFileError
from dynlora.files.json_files import read_json
from dynlora.report.adapter_ranks import read_adapter_ranks
from dynlora.runs.lines import read_events, read_metrics
from dynlora.runs.values import numbers, read_yaml, whole, wrong_value
from dynlora.types import Event

UNFINISHED = {
    "running": "is still running, or was killed before it could say so",
    "interrupted": "was stopped by its user",
    "failed": "ended with an error",
}
"""Description of each status except `finished`."""

MEMORY = ("peak_memory_bytes", "peak_gpu_memory_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The contents of a run's folder."""

    root: Path
    """Folder of the run."""
    status: str
    """`finished`, or a key of `UNFINISHED`."""
    method: str
    """`dynamic`, `lora`, `adalora` or `full`."""
    seed: int | None
    """Seed of initial weights, data order and dropout."""
    written: str
    """Time of the last write of `run.json`, in ISO 8601, or `unknown`."""
    steps: int
    """Optimizer steps taken, or the last logged step if `run.json` has no number."""
    budget: int | None
    """Maximum number of parameters for the method."""
    before: Mapping[str, float | None]
    """Validation metrics before training."""
    after: Mapping[str, float | None]
    """Validation metrics of the saved model; empty in an unfinished run."""
    parameters: Mapping[str, float | None]
    """Parameters in use at the `start`, at the `peak` and at the `end`."""
    seconds: Mapping[str, float | None]
    """Seconds by activity."""
    memory: Mapping[str, int | None]
    """Peak memory in bytes, by kind."""
    rows: Mapping[str, float | None]
    """Rows by split."""
    facts: Mapping[str, Any]
    """Full content of `run.json`."""
    config: Mapping[str, Any]
    """The resolved configuration, as nested mappings."""
    metrics: Sequence[Mapping[str, Any]]
    """Lines of `metrics.jsonl`."""
    events: Sequence[Event]
    """Lines of `ranks.jsonl`."""
    initial_ranks: Mapping[str, int]
    """Rank by module name before the first event; empty for methods with fixed ranks."""
    final_ranks: Mapping[str, int]
    """Latest known rank by module name; empty if the run has no LoRA layers."""
    notes: Sequence[str]
    """Sentences about missing parts and their reasons."""


def read_run(root: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        AdapterError: If a name in its adapter is too long.
        RunFileError: If the folder is not a run's, or one of its files is invalid.
    """
    path = root / "run.json"
    if not root.is_dir() or not path.exists():
        found = "a folder without one" if root.is_dir() else "no folder"
        raise RunFileError(
            f"a run must be a folder with a run.json, got {root}, which is {found}: give the "
            "`output` of a `dynlora train`."
        )
    facts = read_json(path)
    status = facts.get("status")
    known = ["finished", *UNFINISHED]
    if status not in known:
        raise wrong_value(path, "status", f"one of {', '.join(known)}", status)
    metrics, metrics_cut = read_metrics(root / "metrics.jsonl")
    events, events_cut = read_events(root / "ranks.jsonl")
    initial, final = _ranks(root, facts, events)
    logged = max((line["step"] for line in metrics), default=0)
    steps = whole(path, facts, "steps")
    steps = logged if steps is None else steps
    return RunFiles(
        root=root,
        status=status,
        method=str(facts.get("method", "unknown")),
        seed=whole(path, facts, "seed"),
        written=str(facts.get("written", "unknown")),
        steps=steps,
        budget=whole(path, facts, "budget"),
        before=numbers(path, facts, "metrics_before"),
        after=numbers(path, facts, "metrics_after"),
        parameters=numbers(path, facts, "parameters"),
        seconds=numbers(path, facts, "seconds"),
        memory={key: whole(path, facts, key) for key in MEMORY},
        rows=numbers(path, facts, "rows"),
        facts=facts,
        config=read_yaml(root / "config.yaml"),
        metrics=metrics,
        events=events,
        initial_ranks=initial,
        final_ranks=final,
        notes=_notes(facts, steps, metrics, metrics_cut, events_cut),
    )


def _ranks(
    root: Path, facts: Mapping[str, Any], events: Sequence[Event]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return initial and latest ranks, from the events, `run.json` or the adapter."""
    path = root / "run.json"
    final = numbers(path, facts, "final_ranks")
    if not all(isinstance(rank, int) and rank >= 0 for rank in final.values()):
        raise wrong_value(path, "final_ranks", "an object of whole numbers", final)
    ranks = {name: int(rank) for name, rank in final.items() if rank is not None}
    if events:
        last = {name: layer.rank_after for name, layer in events[-1].layers.items()}
        if ranks and ranks.keys() != last.keys():
            raise wrong_value(path, "final_ranks", "of the layers in ranks.jsonl", list(ranks))
        return {n: layer.rank_before for n, layer in events[0].layers.items()}, ranks or last
    return ranks, ranks or read_adapter_ranks(root / "adapter")


def _notes(
    facts: Mapping[str, Any],
    steps: int,
    metrics: Sequence[Mapping[str, Any]],
    metrics_cut: bool,
    events_cut: bool,
) -> list[str]:
    notes = []
    if facts["status"] in UNFINISHED:
        why = f": {facts['error']}" if "error" in facts else ""
        notes.append(f"This run {UNFINISHED[facts['status']]} after {steps} steps{why}.")
    for name, cut in (("metrics.jsonl", metrics_cut), ("ranks.jsonl", events_cut)):
        if cut:
            notes.append(f"The last line of {name} was cut short and is left out.")
    if not metrics:
        notes.append("metrics.jsonl holds no line, so there is no curve to draw.")
    return notes
