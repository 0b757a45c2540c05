"""Tables about one or several runs with raw values, for pages and CSV files."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from dynlora.files.plain_values import flatten
from dynlora.report.curves import LARGEST
from dynlora.report.run_comparison import IGNORED, compare_runs, labels_of, shown
from dynlora.report.wording import CHANCE, is_chance, lower_is_better
from dynlora.runs.reader import RunFiles

ADAPTER = ("method", "lora", "dynamic", "adalora")  # sections in which paired runs may differ
INTERVAL_PAIRS = 3  # least number of pairs for an interval
Numbered = Mapping[int, RunFiles]  # runs by number, from 1


class Table(NamedTuple):
    """Rows of texts, numbers, and None where there is no value."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def words(self) -> list[int]:
        """Return the numbers of the columns with texts."""
        columns = enumerate(zip(*self.rows, strict=True))
        return [place for place, column in columns if any(isinstance(x, str) for x in column)]


def tables_of(runs: Numbered) -> dict[str, Table]:
    """Return all tables by name, without empty ones."""
    found, metric = compare_runs([*runs.values()]), main_metric(runs)
    labels = dict(zip(runs, labels_of([run.root for run in found.runs]), strict=True))
    titles = [f"{number} {label}" for number, label in labels.items()]
    lines = [(str(number), line) for number, run in runs.items() for line in run.metrics]
    keys = dict.fromkeys(key for _, line in lines for key in line)
    tables = {
        "runs": _run_table(labels, runs),
        "settings": Table(
            ["setting", *titles],
            [(key, *map(shown, values)) for key, values in found.settings.items()],
        ),
        "ranks": Table(["layer", *titles], [(name, *each) for name, each in found.ranks.items()]),
        "differences": Table(
            ["metric", "better is", "setting", "base", "mean", "95 % from", "to", "pairs", "runs"],
            [*_differences(runs)],
        ),
        "parameters": Table(
            ["number", "run", "parameters", metric, "Pareto front"],
            [(str(number), labels[number], *values[:2], "yes" if values[2] else "no")
             for number, values in trade_off(runs, metric).items()],
        ),
        "log": Table(["number", *keys], [(number, *map(line.get, keys)) for number, line in lines]),
        "events": Table(
            ["number", "step", "agreement", "parameters", "layer", "rank before", "rank after"],
            [(str(number), event.step, event.agreement, event.parameters, name,
              layer.rank_before, layer.rank_after)
             for number, run in runs.items()
             for event in run.events for name, layer in event.layers.items()],
        ),
    }  # fmt: skip
    return {name: table for name, table in tables.items() if table.rows}


def main_metric(runs: Numbered) -> str:
    """Return the first validation metric; empty if no run has one."""
    return next((name for run in runs.values() for name in (*run.after, *run.before)), "")


def trade_off(runs: Numbered, metric: str) -> dict[int, tuple[float, float, bool]]:
    """Return parameters, a metric, and whether both are on the Pareto front, by number."""
    sign = 1 if lower_is_better(metric) else -1
    points = {n: (run.parameters.get("end") or 0, _after(run, metric)) for n, run in runs.items()}
    costs = {
        n: (size, sign * value)
        for n, (size, value) in points.items()
        if size > 0 and math.isfinite(value)
    }

    def beaten(size: float, cost: float) -> bool:
        return any(a <= size and b <= cost and (a, b) != (size, cost) for a, b in costs.values())

    return {n: (size, sign * cost, not beaten(size, cost)) for n, (size, cost) in costs.items()}


def _after(run: RunFiles, metric: str) -> float:
    """Return a metric after training; NaN if unknown, or of a run no better than chance."""
    value = run.after.get(metric)
    comparable = metric == "loss" or not is_chance(run.after)
    return value if comparable and value is not None and abs(value) <= LARGEST else math.nan


def _run_table(labels: Mapping[int, str], runs: Numbered) -> Table:
    metrics = dict.fromkeys(name for run in runs.values() for name in (*run.before, *run.after))
    costs = {
        number: {f"{key} seconds": value for key, value in run.seconds.items()} | {**run.memory}
        for number, run in runs.items()
    }
    keys = dict.fromkeys(key for each in costs.values() for key in each)
    head = ["number", "run", "method", "seed", "status", "steps"]
    head += [f"{name} {when}" for name in metrics for when in ("before", "after")]
    rows = [
        (str(number), labels[number], run.method, None if run.seed is None else str(run.seed),
         run.status + f", {CHANCE}" * is_chance(run.after), run.steps,
         *(values.get(name) for name in metrics for values in (run.before, run.after)),
         run.parameters.get("end"), run.parameters.get("peak"), str(run.root),
         *map(costs[number].get, keys))
        for number, run in runs.items()
    ]  # fmt: skip
    return Table([*head, "parameters", "at their peak", "folder", *keys], rows)


def _differences(runs: Numbered) -> Iterator[Sequence[Any]]:
    """Yield rows of metrics: the mean difference of runs that are alike but for their adapters.

    A pair has one seed. The interval is Student's, and None with fewer than `INTERVAL_PAIRS`.
    """
    groups: dict[str, dict[str, tuple[dict[str, Any], dict[int, int]]]] = {}
    for number, run in runs.items():
        rest = {key: x for key, x in flatten(run.config).items() if key not in IGNORED}
        rest.pop("training.seed", None)
        own = {key: rest.pop(key) for key in [*rest] if key.partition(".")[0] in ADAPTER}
        alike, setting = (json.dumps(each, sort_keys=True, default=str) for each in (rest, own))
        if run.after and run.seed is not None:
            found = groups.setdefault(alike, {}).setdefault(setting, (own, {}))
            found[1].setdefault(run.seed, number)
    for settings in ([*group.values()] for group in groups.values()):
        for place, (own, numbers) in enumerate(settings):
            first, bases = next(
                (each for each in settings[:place] if each[1].keys() & numbers.keys()), (own, {})
            )
            pairs = [(numbers[seed], bases[seed]) for seed in numbers if seed in bases]
            keys = sorted(key for key in own | first if own.get(key) != first.get(key))
            names = [
                ", ".join([str(each.get("method")), *(f"{key} {shown(each.get(key))}"
                                                      for key in keys if key != "method")])
                for each in (own, first)
            ]  # fmt: skip
            for metric in dict.fromkeys(name for pair in pairs for name in runs[pair[0]].after):
                changes = {
                    (one, base): _after(runs[one], metric) - _after(runs[base], metric)
                    for one, base in pairs
                }
                yield from _difference(metric, names, changes)


def _difference(
    metric: str, names: Sequence[str], changes: Mapping[tuple[int, int], float]
) -> Iterator[Sequence[Any]]:
    """Yield the row of a metric; none if no pair has finite values."""
    found = {pair: change for pair, change in changes.items() if math.isfinite(change)}
    values, reach = [*found.values()], None
    if len(values) >= INTERVAL_PAIRS:
        from scipy.stats import t

        reach = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    if values:
        mean = fmean(values)
        interval = (None, None) if reach is None else (mean - reach, mean + reach)
        told = ", ".join(f"{one} − {other}" for one, other in found)
        better = "lower" if lower_is_better(metric) else "higher"
        yield metric, better, *names, mean, *interval, len(values), told
