"""What a run's events say: whether ranks moved, why not, one line each, and a table of layers."""

from collections.abc import Mapping, Sequence

from dynlora.layer_names import short_names
from dynlora.types import SIGNIFICANT, Event


def is_scored(event: Event) -> bool:
    """Return whether any layer had a score at an event."""
    return any(layer.score is not None for layer in event.layers.values())


def moved(event: Event) -> bool:
    """Return whether any layer's rank changed at an event."""
    return any(layer.rank_before != layer.rank_after for layer in event.layers.values())


def stillness(events: Sequence[Event]) -> str | None:
    """Return the reason why no rank changed in these events; None if one did."""
    if any(moved(event) for event in events):
        return None
    if not events:
        return "no event came: the run was over before the first one was due"
    if all(event.agreement == 0 for event in events):
        return (
            "up to the last event no two gradients were compared: the run is of very few steps, or "
            "`observe()` was not called in each, between `backward` and the optimizer's step, or "
            "all gradients were NaN or infinite (`DynamicLora.skipped` counts those)"
        )
    return _undecided(events)


def _undecided(events: Sequence[Event]) -> str:
    scores = [{x.score for x in event.layers.values()} - {None} for event in events]
    waiting = {name for event in events for name, layer in event.layers.items() if layer.waits}
    if not any(scores):
        return (
            "up to the last event the batches' gradients did not agree beyond chance, and "
            "then no layer is scored; a longer run or a larger batch may show more"
        )
    if all(len(seen) <= 1 for seen in scores):
        return "every layer had the same score"
    if waiting:
        layers = "1 layer" if len(waiting) == 1 else f"{len(waiting)} layers"
        return f"{layers} would have lost more of their output than dynamic.shrink_tolerance allows"
    return "no layer that could grow stood out by more than dynamic.hysteresis"


def describe(event: Event) -> str:
    """Return an event in one line: how many ranks changed, which most, and the agreement."""
    changes = {name: x.rank_after - x.rank_before for name, x in event.layers.items()}
    changed, agreement = sum(map(bool, changes.values())), f"agreement {event.agreement:.1f}"
    if not is_scored(event):
        agreement += f" of {SIGNIFICANT}"
    if not changed:
        return f"no rank changed; {agreement}"
    most = max(changes, key=changes.__getitem__)
    kind = "gained"
    if changes[most] <= 0:
        most, kind = min(changes, key=changes.__getitem__), "lost"
    layer = event.layers[most]
    return (
        f"{changed} of {len(changes)} layers changed rank; most {kind}: "
        f"{short_names(list(changes))[most]} {layer.rank_before} → {layer.rank_after}; {agreement}"
    )


def summary(ranks: Mapping[str, int], events: Sequence[Event]) -> str:
    """Return a table of all layers: the first and the present rank, and the last event's figures.

    Args:
        ranks: Present rank by module name.
        events: All events so far.
    """
    rows = [["layer", "first r", "r", "score", "input variance", "output lost"]]
    short = short_names(list(ranks))
    for name, rank in ranks.items():
        if not events:
            rows.append([short[name], str(rank), str(rank), "", "", ""])
            continue
        first, last = events[0].layers[name].rank_before, events[-1].layers[name]
        figures = [
            "" if value is None else f"{value:.3g}"
            for value in (last.score, last.variance, last.output_lost)
        ]
        rows.append([short[name], str(first), str(rank), *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
