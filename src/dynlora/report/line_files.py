"""`metrics.jsonl` and `ranks.jsonl` of a run, each line checked for what drawing relies on."""

from pathlib import Path
from typing import Any

from dynlora.report.plain_files import broken_line, read_lines
from dynlora.types import Event


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return what was logged, and whether the last line was cut short.

    Raises:
        RunFileError: If a whole line is not a JSON object with a step.
    """
    lines, cut = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise broken_line(path, number, f"step {line.get('step')!r}")
    return lines, cut


def read_events(path: Path) -> tuple[list[Event], bool]:
    """Return the events, and whether the last line was cut short.

    Raises:
        RunFileError: If a whole line is not an event, or one of other layers than the first.
    """
    lines, cut = read_lines(path)
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = Event.from_dict(line)
            _check_event(event, events[-1] if events else event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            given = f"one without the figures of an event ({type(error).__name__}: {error})"
            raise broken_line(path, number, given) from error
        events.append(event)
    return events, cut


def _check_event(event: Event, past: Event) -> None:
    """Check what drawing relies on.

    Raises:
        TypeError: If a figure is not a number.
        ValueError: If a rank is below 0, or layers and step do not follow on the event before.
    """
    figures = [event.step, event.parameters]
    for layer in event.layers.values():
        figures += [layer.rank_before, layer.rank_after]
    if not all(isinstance(figure, int) for figure in figures):
        raise TypeError("step, parameters and ranks must be whole numbers")
    if min(figures) < 0 or not isinstance(event.agreement, int | float):
        raise ValueError("ranks must be at least 0 and the agreement a number")
    if event.layers.keys() != past.layers.keys() or not event.layers or event.step < past.step:
        raise ValueError("layers must be those of the line before, and steps in order")
