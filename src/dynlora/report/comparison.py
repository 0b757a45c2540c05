"""Runs side by side: finished runs in; what differs in ranks and settings, and what to beware of.

Nothing is printed here; `comparison_table` shows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.errors import RunFileError
from dynlora.report.run_files import UNFINISHED, RunFiles, read_run
from dynlora.report.unfinished import finish_command
from dynlora.report.wording import count_text

IGNORED = ("output", "overwrite", "training.resume")
"""Settings that say nothing of what a run is."""
ABSENT = "(not a setting)"
"""Stands for a setting that a run's configuration does not have: another version wrote it."""
SAME_FOR_ALL = ("task", "model", "data")
"""Sections of the configuration without which metrics cannot be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRanks:
    """One layer's rank in each run."""

    name: str
    """Module name."""
    ranks: tuple[int | None, ...]
    """By run; None where the run has no LoRA there."""

    @property
    def difference(self) -> int:
        """Highest less lowest rank among the runs that have the layer."""
        found = [rank for rank in self.ranks if rank is not None]
        return max(found) - min(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What there is to say about several runs."""

    runs: tuple[RunFiles, ...]
    """In the order given; at least two."""
    labels: tuple[str, ...]
    """A short name for each run."""
    layers: tuple[LayerRanks, ...]
    """Each layer of any run, largest difference first."""
    settings: Mapping[str, tuple[Any, ...]]
    """Values by run of each setting that differs, by dotted key."""
    warnings: tuple[str, ...]
    """Why the runs cannot simply be compared."""

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values."""
        return {
            "runs": [_run_dict(run) for run in self.runs],
            "ranks": [
                {"layer": layer.name, "ranks": [*layer.ranks], "difference": layer.difference}
                for layer in self.layers
            ],
            "configuration": {key: [*values] for key, values in self.settings.items()},
            "warnings": [*self.warnings],
        }


def read_finished(root: Path) -> RunFiles:
    """Return a run that has a result.

    Raises:
        RunFileError: If it is not a run, or not finished.
    """
    run = read_run(root)
    if run.status != "finished":
        raise RunFileError(
            f"runs to compare must be finished, got {root}, which {UNFINISHED[run.status]} after "
            f"{run.steps} steps: finish it with `{finish_command(root, run.method)}`, or "
            "see `dynlora report` for what there is."
        )
    return run


def compare_runs(runs: Sequence[RunFiles]) -> Comparison:
    """Return what differs between runs.

    Args:
        runs: At least two, all finished; the same one twice differs in nothing.
    """
    names = dict.fromkeys(name for run in runs for name in run.final_ranks)
    layers = [
        LayerRanks(name=name, ranks=tuple(run.final_ranks.get(name) for run in runs))
        for name in names
    ]
    settings = _differences([dict(_flat(run.config)) for run in runs])
    return Comparison(
        runs=tuple(runs),
        labels=_labels(runs),
        layers=tuple(sorted(layers, key=lambda layer: -layer.difference)),
        settings=settings,
        warnings=tuple(_warnings(runs, settings)),
    )


def shown(value: object) -> str:
    """Return a setting as YAML users write it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    keys = dict.fromkeys(key for config in configs for key in config if key not in IGNORED)
    values = {key: tuple(config.get(key, ABSENT) for config in configs) for key in keys}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found)}


def _labels(runs: Sequence[RunFiles]) -> tuple[str, ...]:
    """Return the folders' names, or their paths where two have the same name."""
    names = [run.root.resolve().name for run in runs]
    return tuple(names if len(set(names)) == len(names) else [str(run.root) for run in runs])


def _warnings(runs: Sequence[RunFiles], settings: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    for section in SAME_FOR_ALL:
        for key, values in settings.items():
            known = ABSENT not in values
            if known and (key == section or key.startswith(f"{section}.")):
                yield f"other {section}: {key} is {_versus(values)}"
    facts: dict[str, list[Any]] = {
        "rows": [
            ", ".join(f"{count_text(n)} {split}" for split, n in run.rows.items()) for run in runs
        ],
        "number of steps": [run.steps for run in runs],
        "seeds": [run.seed for run in runs],
    }
    for name, values in facts.items():
        if any(value != values[0] for value in values):
            yield f"other {name}: {_versus(values)}"
    machines = [run.facts.get("machine") for run in runs]
    if any(machine != machines[0] for machine in machines):
        yield "other machines: seconds and memory cannot be compared"


def _versus(values: Sequence[object]) -> str:
    return " against ".join(dict.fromkeys(shown(value) for value in values))


def _run_dict(run: RunFiles) -> dict[str, Any]:
    return {
        "run": str(run.root),
        "method": run.method,
        "seed": run.seed,
        "steps": run.steps,
        "rows": {**run.rows},
        "metrics_before": {**run.before},
        "metrics_after": {**run.after},
        "budget": run.budget,
        "parameters": {**run.parameters},
        "seconds": {**run.seconds},
        **run.memory,
    }
