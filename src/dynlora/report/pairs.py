"""Compare metrics of finished runs: differences paired by seed, and the Pareto front."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from dynlora.files.plain_values import flatten
from dynlora.report.run_comparison import ABSENT, IGNORED, shown
from dynlora.report.wording import is_collapsed, lower_is_better
from dynlora.runs.reader import RunFiles

ADAPTER = ("method", "lora", "dynamic", "adalora")  # sections in which paired runs may differ
INTERVAL_PAIRS = 3  # least number of pairs with an interval
CONFIDENCE = 0.95
Numbered = Mapping[int, RunFiles]  # runs by their number, from 1


class Difference(NamedTuple):
    """The mean difference of a metric between runs of two settings and equal seeds."""

    metric: str
    setting: str
    against: str  # the setting whose metric is subtracted
    mean: float
    interval: tuple[float, float] | None  # None with too few pairs
    pairs: Sequence[tuple[int, int]]  # numbers of the runs of `setting` and `against`


def paired_differences(runs: Numbered) -> Iterator[Difference]:
    """Yield each metric's difference from the first setting of a method and its adapter.

    Runs are a pair if they are finished, have the same seed, and differ in no other setting.
    """
    groups: dict[str, dict[str, dict[int, int]]] = {}
    configs = {number: _flat(run) for number, run in runs.items()}
    for number, run in runs.items():
        if run.after and run.seed is not None:
            own = {key: configs[number][key] for key in configs[number] if _is_adapter(key)}
            rest = {key: value for key, value in configs[number].items() if key not in own}
            settings = groups.setdefault(_text(rest), {})
            settings.setdefault(_text(own), {}).setdefault(run.seed, number)
    for settings in groups.values():
        first, *others = settings.values()
        names = _names([configs[min(numbers.values())] for numbers in settings.values()])
        for name, numbers in zip(names[1:], others, strict=True):
            pairs = [(numbers[seed], first[seed]) for seed in numbers if seed in first]
            yield from _differences(runs, pairs, name, names[0])


def front_of(points: Mapping[int, tuple[float, float]], metric: str) -> set[int]:
    """Return the numbers of points that no other one beats in parameters and in the metric."""
    sign = 1 if lower_is_better(metric) else -1
    costs = {number: (size, sign * value) for number, (size, value) in points.items()}
    return {
        number
        for number, (size, cost) in costs.items()
        if not any(a <= size and b <= cost and (a, b) != (size, cost) for a, b in costs.values())
    }


def trade_off(runs: Numbered, metric: str) -> dict[int, tuple[float, float]]:
    """Return parameters at the end and a metric by number, without runs that lack either.

    Of a collapsed model, only the loss is comparable.
    """
    return {
        number: (size, value)
        for number, run in runs.items()
        if (size := run.parameters.get("end"))
        and (value := run.after.get(metric)) is not None
        and math.isfinite(value)
        and (metric == "loss" or not is_collapsed(run.after))
    }


def _differences(
    runs: Numbered, pairs: Sequence[tuple[int, int]], name: str, against: str
) -> Iterator[Difference]:
    for metric in dict.fromkeys(metric for pair in pairs for metric in runs[pair[0]].after):
        found = {}
        for pair in pairs:
            one, other = (runs[number].after.get(metric) for number in pair)
            if one is not None and other is not None and math.isfinite(one - other):
                found[pair] = one - other
        if found:
            values = [*found.values()]
            yield Difference(metric, name, against, fmean(values), _interval(values), [*found])


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's interval of the mean; None for fewer than `INTERVAL_PAIRS` values."""
    if len(values) < INTERVAL_PAIRS:
        return None
    from scipy.stats import t

    reach = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - float(reach), fmean(values) + float(reach)


def _flat(run: RunFiles) -> dict[str, Any]:
    left_out = (*IGNORED, "training.seed")
    return {key: value for key, value in flatten(run.config).items() if key not in left_out}


def _is_adapter(key: str) -> bool:
    return key.partition(".")[0] in ADAPTER


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)


def _names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the method per configuration, with the settings that differ within the method."""
    names = []
    for config in configs:
        same = [other for other in configs if other.get("method") == config.get("method")]
        keys = dict.fromkeys(key for other in same for key in other if _is_adapter(key))
        values = {key: [other.get(key, ABSENT) for other in same] for key in keys}
        differing = [key for key in keys if any(v != values[key][0] for v in values[key])]
        told = (f"{key} {shown(config.get(key, ABSENT))}" for key in differing)
        names.append(", ".join([shown(config.get("method", ABSENT)), *told]))
    return names
