"""Compare finished runs: ranks, settings and warnings about unequal conditions, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dynlora.files.plain_values import flatten
from dynlora.layer_names import short_names
from dynlora.report import wording
from dynlora.runs.folder import RunFolder
from dynlora.runs.reader import RunFiles, read_run, refuse_unfinished

IGNORED = ("output", "overwrite", "training.resume")  # settings that do not affect a run's result
ABSENT = "(not a setting)"  # for a setting missing in the configuration of a run by another version
SAME_FOR_ALL = ("task", "model", "data")  # sections that must be equal for comparable metrics
LAYERS = 10  # maximum number of layers in the table of ranks; `--json` lists all
Rows = Sequence[tuple[str, Sequence[str]]]  # label and cells per row


@dataclass(frozen=True, kw_only=True, slots=True)
class RunComparison:
    """Differences between finished runs."""

    runs: tuple[RunFiles, ...]  # in the order of the arguments; at least two
    ranks: Mapping[str, tuple[int | None, ...]]
    """Rank per run by module name, largest difference first; None where a run has no LoRA."""
    settings: Mapping[str, tuple[Any, ...]]  # values per run, by dotted key, if they differ
    warnings: tuple[str, ...]  # reasons why the runs are not fully comparable

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values."""
        return {
            "runs": [
                {
                    "run": str(run.root),
                    "method": run.method,
                    "seed": run.seed,
                    "steps": run.steps,
                    "rows": run.rows,
                    "metrics_before": run.before,
                    "metrics_after": run.after,
                    "budget": run.budget,
                    "parameters": run.parameters,
                    "seconds": run.seconds,
                    **run.memory,
                }
                for run in self.runs
            ],
            "ranks": [
                {"layer": name, "ranks": [*ranks], "difference": _difference(ranks)}
                for name, ranks in self.ranks.items()
            ],
            "configuration": {key: [*values] for key, values in self.settings.items()},
            "warnings": [*self.warnings],
        }


def read_finished(root: Path) -> RunFiles:
    """Read a run; raise `RunFileError` if it is not a finished one."""
    run = read_run(root)
    refuse_unfinished(RunFolder(root), run.facts)
    return run


def compare_runs(runs: Sequence[RunFiles]) -> RunComparison:
    """Compare two or more finished runs; the same run may come twice."""
    names = dict.fromkeys(name for run in runs for name in run.final_ranks)
    ranks = {name: tuple(run.final_ranks.get(name) for run in runs) for name in names}
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in IGNORED)
    values = {key: tuple(config.get(key, ABSENT) for config in configs) for key in keys}
    settings = {key: found for key, found in values.items() if any(v != found[0] for v in found)}
    return RunComparison(
        runs=tuple(runs),
        ranks=dict(sorted(ranks.items(), key=lambda layer: -_difference(layer[1]))),
        settings=settings,
        warnings=tuple(_warnings(runs, settings)),
    )


def labels_of(roots: Sequence[Path]) -> list[str]:
    """Return the name of each run's folder, or all paths if two names are equal."""
    labels = [root.resolve().name for root in roots]
    return labels if len(set(labels)) == len(labels) else [*map(str, roots)]


def _difference(ranks: Sequence[int | None]) -> int:
    """Return the highest minus the lowest rank among the runs that have the layer."""
    found = [rank for rank in ranks if rank is not None]
    return max(found) - min(found)


def _warnings(runs: Sequence[RunFiles], settings: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    for key, values in settings.items():
        section = key.partition(".")[0]
        if section in SAME_FOR_ALL and ABSENT not in values:
            yield f"other {section}: {key} is {_versus(values)}"
    facts: dict[str, list[Any]] = {
        "rows": [
            ", ".join(f"{wording.count_text(n)} {split}" for split, n in run.rows.items())
            for run in runs
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
    return " against ".join(dict.fromkeys(map(shown, values)))


def shown(value: object) -> str:
    """Format a setting as in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def comparison_table(found: RunComparison) -> RenderableType:
    """Return the comparison as tables to print, with the warnings last."""
    runs = found.runs
    facts = [
        ("method", [run.method for run in runs]),
        ("seed", [shown(run.seed) for run in runs]),
        ("steps", [wording.count_text(run.steps) for run in runs]),
    ]
    sections = (facts, [*_metrics(runs)], [*_parameters(runs)], [*_costs(runs)])
    parts: list[RenderableType] = [*_table("dynlora compare", runs, sections)]
    short = short_names(list(found.ranks))
    differing = {short[name]: ranks for name, ranks in found.ranks.items() if _difference(ranks)}
    if differing:
        most = [
            (name, ["–" if rank is None else str(rank) for rank in ranks])
            for name, ranks in list(differing.items())[:LAYERS]
        ]
        title = f"ranks that differ most, {len(most)} of {len(differing)} layers"
        parts += _table(title, runs, [most])
    elif found.ranks:
        parts.append(Text("no layer that two runs share has another rank"))
    if found.settings:
        settings = [(key, [*map(shown, values)]) for key, values in found.settings.items()]
        parts += _table("settings that differ", runs, [settings])
    parts += [Text(f"not comparable, {warning}", style="yellow") for warning in found.warnings]
    return Group(*parts)


def _table(title: str, runs: Sequence[RunFiles], sections: Sequence[Rows]) -> tuple[Text, Table]:
    """Return a heading and a table; unlike a table's title, the heading may be wider."""
    table = Table()
    table.add_column(style="bold", overflow="fold")
    for label in labels_of([run.root for run in runs]):
        table.add_column(Text(label), justify="right", overflow="fold")
    for rows in sections:
        for name, cells in rows:
            table.add_row(Text(name), *map(Text, cells))
        table.add_section()
    return Text(title, style="italic"), table


def _metrics(runs: Sequence[RunFiles]) -> Iterator[tuple[str, list[str]]]:
    """Yield each metric before and after training, with the difference from the first run."""
    for name in dict.fromkeys(name for run in runs for name in run.after):
        yield f"{name} before", [_metric(run.before, name) for run in runs]
        after = [_metric(run.after, name) for run in runs]
        for place, run in enumerate(runs[1:], start=1):
            change = wording.change_text(runs[0].after.get(name), run.after.get(name))
            after[place] += f" ({change})" if change else ""
        yield f"{name} after", after
    chance = ["yes" if wording.is_chance(run.after) else "" for run in runs]
    if any(chance):
        yield wording.CHANCE, chance


def _metric(values: Mapping[str, float | None], name: str) -> str:
    return wording.metric_text(values[name]) if name in values else "–"


def _parameters(runs: Sequence[RunFiles]) -> Iterator[tuple[str, list[str]]]:
    yield "budget", [wording.count_text(run.budget) for run in runs]
    for key, name in (("end", "parameters"), ("peak", "at their peak")):
        yield name, [wording.count_text(run.parameters.get(key)) for run in runs]


def _costs(runs: Sequence[RunFiles]) -> Iterator[tuple[str, list[str]]]:
    for key in dict.fromkeys(key for run in runs for key in run.seconds):
        yield key.replace("_", " "), [wording.seconds_text(run.seconds.get(key)) for run in runs]
    for key in runs[0].memory:
        sizes = [run.memory.get(key) for run in runs]
        if any(size is not None for size in sizes):
            yield (
                key.removesuffix("_bytes").replace("_", " "),
                [wording.bytes_text(size) for size in sizes],
            )
