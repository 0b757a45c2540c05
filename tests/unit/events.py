"""Events made by hand for the report's tests."""

from collections.abc import Mapping

from dynlora.history import Event, LayerEvent


def make_event(
    step: int,
    before: Mapping[str, int],
    after: Mapping[str, int],
    *,
    scores: Mapping[str, float | None] | None = None,
    waits: tuple[str, ...] = (),
) -> Event:
    """Return an event that took layers from ranks to other ranks."""
    layers = {
        name: LayerEvent(
            rank_before=before[name],
            rank_after=after[name],
            score=None if scores is None else scores[name],
            share=1 / len(before),
            weight=1.0,
            variance=None,
            effective_rank=None,
            output_lost=0.0,
            waits=name in waits,
        )
        for name in before
    }
    return Event(step=step, parameters=0, agreement=3.0, layers=layers)
