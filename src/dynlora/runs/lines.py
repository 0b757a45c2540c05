"""`metrics.jsonl` and `ranks.jsonl` of a run: read them, and check the values in each line."""

from pathlib import Path
from typing import Any

from dynlora.files.json_files import broken_line, read_lines
from dynlora.history import Event
from dynlora.runs.record import check_kind

_AT_LAST = {"train_runtime", "best_loss"}  # keys of lines written after a run's last step


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the logged metrics, and whether the last line was cut short."""
    lines, cut = read_lines(path)
    for number, line in enumerate(lines, start=1):
        step = line.get("step")
        if type(step) is not int or step < 0:
            raise broken_line(path, number, f"step {str(step)[:40]!r}")
    return lines, cut


def metrics_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the metrics up to a step, without the final lines of a finished run."""
    lines, _ = read_metrics(path)
    return [line for line in lines if line["step"] <= step and not line.keys() & _AT_LAST]


def read_events(path: Path) -> tuple[list[Event], bool]:
    """Return the events, and whether the last line was cut short."""
    lines, cut = read_lines(path)
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            check_kind(line, Event, "event")
            event = Event.from_dict(line)
            _check_event(event, events[-1] if events else event)
        except ValueError as error:
            raise broken_line(
                path, number, f"one that is not an event ({str(error)[:300]})"
            ) from error
        events.append(event)
    return events, cut


def _check_event(event: Event, past: Event) -> None:
    """Check the range of an event's values, and that it fits the previous event."""
    layers = event.layers.values()
    counts = [event.step, event.parameters]
    counts += [rank for layer in layers for rank in (layer.rank_before, layer.rank_after)]
    if min(counts) < 0:
        raise ValueError("`step`, `parameters` and ranks must be at least 0")
    if event.layers.keys() != past.layers.keys() or not event.layers or event.step < past.step:
        raise ValueError("`layers` must be those of the line before, and `step` in order")
