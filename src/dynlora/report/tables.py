"""Tables about one or several runs with raw values, for pages and for CSV files."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dynlora.report import wording
from dynlora.report.pairs import Numbered, front_of, paired_differences, trade_off
from dynlora.report.run_comparison import compare_runs, labels_of


class Table(NamedTuple):
    """Rows of raw values: texts, numbers, and None where there is none."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shown: int | None = None  # columns on a page; None for all

    @property
    def words(self) -> list[int]:
        """Return the columns with texts."""
        columns = enumerate(zip(*self.rows, strict=True))
        return [place for place, column in columns if any(isinstance(x, str) for x in column)]


def main_metric(runs: Numbered) -> str:
    """Return the first validation metric of the first run with metrics; empty if there is none."""
    return next((name for run in runs.values() for name in (*run.after, *run.before)), "")


def run_table(runs: Numbered) -> Table:
    """Return a row per run: identity, steps, parameters, metrics; not on pages, its costs."""
    names = dict.fromkeys(name for run in runs.values() for name in (*run.before, *run.after))
    seconds = dict.fromkeys(name for run in runs.values() for name in run.seconds)
    memory = dict.fromkeys(name for run in runs.values() for name in run.memory)
    head = ["number", "run", "note", "method", "seed", "steps", "parameters", "at their peak"]
    head += [f"{name} {when}" for name in names for when in ("before", "after")]
    hidden = ["folder", *(f"{name} (seconds)" for name in seconds), *memory]
    labels, rows = labels_of([*runs.values()]), []
    for (number, run), label in zip(runs.items(), labels, strict=True):
        notes = [] if run.status == "finished" else [f"{run.status} after {run.steps} steps"]
        for when, values in {"before": run.before, "after": run.after}.items():
            notes += [f"collapsed {when} training"] * wording.is_collapsed(values)
        seed = None if run.seed is None else str(run.seed)
        row = [str(number), label, "; ".join(notes), run.method, seed, run.steps]
        row += [run.parameters.get("end"), run.parameters.get("peak")]
        row += [values.get(name) for name in names for values in (run.before, run.after)]
        row += [str(run.root), *map(run.seconds.get, seconds), *map(run.memory.get, memory)]
        rows.append(row)
    return Table("runs", head + hidden, rows, len(head))


def comparison_tables(runs: Numbered) -> dict[str, Table]:
    """Return the tables that compare runs, by name, without empty ones."""
    found, metric = compare_runs([*runs.values()]), main_metric(runs)
    labels = [
        f"{number} {label}" for number, label in zip(runs, labels_of(found.runs), strict=True)
    ]
    points = trade_off(runs, metric)
    front = front_of(points, metric)
    head = ["metric", "better is", "setting", "against", "mean difference", "95 % from", "to"]
    pairs = [
        (
            *(each.metric, "lower" if wording.lower_is_better(each.metric) else "higher"),
            *(each.setting, each.against, each.mean, *(each.interval or (None, None))),
            *(len(each.pairs), ", ".join(f"{one} − {other}" for one, other in each.pairs)),
        )
        for each in paired_differences(runs)
    ]
    tables = [
        Table("ranks", ["layer", *labels], [(name, *ranks) for name, ranks in found.ranks.items()]),
        Table("pairs", [*head, "pairs", "runs"], pairs),
        Table(
            "parameters",
            ["number", "run", "parameters", metric, "Pareto front"],
            [
                (*labels[number - 1].split(" ", 1), *point, "yes" if number in front else "no")
                for number, point in points.items()
            ],
        ),
        Table(
            "settings",
            ["setting", *labels],
            [(key, *map(str, values)) for key, values in found.settings.items()],
        ),
    ]
    return {table.name: table for table in tables if table.rows}


def log_tables(runs: Numbered) -> list[Table]:
    """Return the logged values and the rank changes at events of all runs, as in their files."""
    lines = [(str(number), line) for number, run in runs.items() for line in run.metrics]
    keys = dict.fromkeys(key for _, line in lines for key in line)
    logged = [(number, *map(line.get, keys)) for number, line in lines]
    events = [
        (str(number), event.step, event.agreement, event.parameters, name, *_moved(layer))
        for number, run in runs.items()
        for event in run.events
        for name, layer in event.layers.items()
    ]
    head = ["number", "step", "agreement", "parameters", "layer", "rank before", "rank after"]
    return [Table("log", ["number", *keys], logged), Table("events", head, events)]


def _moved(layer: Any) -> tuple[int, int]:
    return layer.rank_before, layer.rank_after
