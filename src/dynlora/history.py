"""The events of a run in words: whether ranks moved, which, and why not; and a table of layers.

Without torch, because pages about runs are made without it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dynlora.layer_names import short_names

SIGNIFICANT = 2.5
"""Agreement of gradients from which layers have scores, in standard errors: random gradients pass
in 0.6 % of tests, and in at most 3 % of runs with five events."""

MOVERS = 3  # most layers listed as gaining most, and as losing most


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerEvent:
    """Result of one event for one layer, with the statistics behind it."""

    rank_before: int
    rank_after: int
    score: float | None
    """Importance per parameter; None if the layer has no score."""
    share: float
    """Share of the budget before rounding to ranks, in ``[0, 1]``; all shares sum to 1. Without
    scores the share that the layer held before."""
    weight: float
    """Layer weight, in ``[0.5, 2]``; 1 unless `layer_weights` is on."""
    variance: float | None
    """Input variance (see `FeatureStats`); None if no input was sampled."""
    effective_rank: float | None
    """Effective rank of the input; None if no input was sampled."""
    output_lost: float
    """Norm of the dropped output, relative to the layer's output norm on the sampled tokens."""
    waits: bool
    """Whether only `shrink_tolerance` kept the layer from shrinking further."""
    directions: float | None = None
    """Number of output directions of the gradients so far, at least 1; None if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Event:
    """One reallocation: a line of `ranks.jsonl`."""

    step: int
    """Optimizer steps taken before the event."""
    parameters: int
    """Live LoRA parameters after the event."""
    agreement: float
    """Agreement of consecutive gradients in standard errors; fixed once an event measures at least
    `SIGNIFICANT`, from which on layers have scores."""
    layers: Mapping[str, LayerEvent]

    def __repr__(self) -> str:
        """Return how many ranks changed, instead of hundreds of figures."""
        changed = sum(layer.rank_before != layer.rank_after for layer in self.layers.values())
        return (
            f"Event(step={self.step}, parameters={self.parameters}, "
            f"agreement={self.agreement:.1f}, changed={changed} of {len(self.layers)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the event as a JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Event":
        """Return the event that `to_dict` converted."""
        layers = {name: LayerEvent(**layer) for name, layer in values["layers"].items()}
        figures = {key: values[key] for key in ("step", "parameters", "agreement")}
        return cls(**figures, layers=layers)


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
        return (
            "no event came before the end of the run, or its best checkpoint; "
            "train longer, or lower dynamic.first_event"
        )
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
        return "every layer had the same score; try another metric as dynamic.importance"
    if waiting:
        layers = "1 layer" if len(waiting) == 1 else f"{len(waiting)} layers"
        return (
            f"{layers} would have lost more of their output than dynamic.shrink_tolerance allows; "
            "raise it if a temporary loss is acceptable"
        )
    return (
        "no layer that could grow stood out by more than dynamic.hysteresis; lower it, or keep "
        "plain LoRA, because the layers need rank alike"
    )


def describe(event: Event) -> str:
    """Return an event in one line: how many ranks changed, which most, and the agreement."""
    changes = {name: x.rank_after - x.rank_before for name, x in event.layers.items()}
    # Rounded down, so that less than `SIGNIFICANT` does not look like it.
    agreement = f"agreement {math.floor(10 * event.agreement) / 10}"
    changed = sum(map(bool, changes.values()))
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


def largest_moves(first: Mapping[str, int], last: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Return the layers that gained most and those that lost most, at most `MOVERS` of each."""
    moves = {name: rank - first[name] for name, rank in last.items()}
    by_gain = sorted(moves, key=lambda name: -moves[name])
    gained = [name for name in by_gain[:MOVERS] if moves[name] > 0]
    return gained, [name for name in by_gain[: -MOVERS - 1 : -1] if moves[name] < 0]


def conclusion(events: Sequence[Event]) -> str:
    """Return in three lines how the ranks moved in at least one event."""
    first = {name: layer.rank_before for name, layer in events[0].layers.items()}
    last = {name: layer.rank_after for name, layer in events[-1].layers.items()}
    short, count = short_names(list(first)), sum(map(moved, events))
    up, down = (sum(sign * (last[name] - first[name]) > 0 for name in first) for sign in (1, -1))
    moves = f"{count} of {len(events)} events (layers: {up} up, {down} down)"
    lines = [f"ranks are final; they moved at {moves}"]
    for label, names in zip(("gained", "lost"), largest_moves(first, last), strict=True):
        layers = [f"{short[name]} {first[name]} → {last[name]}" for name in names]
        lines.append(f"{label} most: {', '.join(layers) or 'no layer'}")
    return "\n".join(lines)


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


def reasons(events: Sequence[Event]) -> dict[str, str]:
    """Return why each layer has its last rank, in a phrase from the figures of at least one event.

    A score per parameter decides where rank goes; directions limit how much a layer can use.
    """
    first, last = events[0].layers, events[-1].layers
    scored = next(filter(is_scored, reversed(events)), None)
    if scored is None:
        return dict.fromkeys(last, "no layer was scored")
    scores = {name: x.score for name, x in scored.layers.items() if x.score is not None}
    places: dict[float, int] = {}  # equal scores share the first place
    for place, value in enumerate(sorted(scores.values(), reverse=True), start=1):
        places.setdefault(value, place)
    found = {}
    for name, layer in last.items():
        score = scores.get(name)
        parts = [f"score {places[score]} of {len(scores)}" if score is not None else "no score"]
        if layer.directions is not None:
            parts.append(f"gradients in {layer.directions:.0f} directions")
        if layer.waits:
            parts.append("shrinking further would lose more output than dynamic.shrink_tolerance")
        elif layer.rank_after < first[name].rank_before:
            lost = max(event.layers[name].output_lost for event in events)
            parts.append(f"its largest cut lost {100 * lost:.1f} % of its output")
        found[name] = ", ".join(parts)
    return found
