"""Compare finished runs: ranks, settings, and warnings about unequal conditions.

`comparison_table` prints the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.errors import RunFileError
from dynlora.report.wording import count_text
from dynlora.runs.checkpoints import finish_command
from dynlora.runs.reader import RunFiles, read_run
from dynlora.runs.record import UNFINISHED

IGNORED = ("output", "overwrite", "training.resume")
"""Settings that do not affect a run's result."""
ABSENT = "(not a setting)"
"""Placeholder for a setting missing from a run's configuration, written by another version."""
SAME_FOR_ALL = ("task", "model", "data")
"""Sections of the configuration that must be equal for metrics to be comparable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRanks:
    """The rank of one layer in each run."""

    name: str
    """Module name."""
    ranks: tuple[int | None, ...]
    """Rank per run; None where the run has no LoRA on the layer."""

    @property
    def difference(self) -> int:
        """Highest minus lowest rank among the runs that have the layer."""
        found = [rank for rank in self.ranks if rank is not None]
        return max(found) - min(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Differences between several runs."""

    runs: tuple[RunFiles, ...]
    """In the order of the arguments; at least two."""
    labels: tuple[str, ...]
    """A short name for each run."""
    layers: tuple[LayerRanks, ...]
    """Layers of all runs, largest difference first."""
    settings: Mapping[str, tuple[Any, ...]]
    """Values per run of each setting that differs, by dotted key."""
    warnings: tuple[str, ...]
    """Reasons why the runs are not fully comparable."""

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
    """Read a finished run.

    Raises:
        RunFileError: If the folder is not a run or the run is not finished.
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
    """Compare finished runs.

    Args:
        runs: At least two, all finished; may contain the same run twice.
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
    """Format a setting as in YAML."""
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
    """Return the folder names, or the paths if two names are equal."""
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
