"""Reason for unchanged ranks: events in, one sentence out."""

from collections.abc import Sequence

from dynlora.types import Event


def stillness(events: Sequence[Event]) -> str | None:
    """Return the reason why no rank changed; None if one did.

    Args:
        events: Events in order; may be empty.
    """
    if any(moved(event) for event in events):
        return None
    if not events:
        return "no event came: the run was over before the first one was due"
    if nothing_compared(events):
        return (
            "up to the last event no two gradients were compared: the run is of very few steps, or "
            "`observe()` was not called in each, between `backward` and the optimizer's step, or "
            "all gradients were NaN or infinite (`DynamicLora.skipped` counts those)"
        )
    return _undecided(events)


def nothing_compared(events: Sequence[Event]) -> bool:
    """Return whether no event had compared gradients; False without events."""
    return bool(events) and all(event.agreement == 0 for event in events)


def moved(event: Event) -> bool:
    """Return whether any layer's rank changed at an event."""
    return any(layer.rank_before != layer.rank_after for layer in event.layers.values())


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
