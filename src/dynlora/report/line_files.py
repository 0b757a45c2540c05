"""`metrics.jsonl` and `ranks.jsonl` of a run, each line checked for what drawing relies on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora.files.json_files import broken_line, read_lines
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
            _check_figures(line)
            event = Event.from_dict(line)
            _check_order(event, events[-1] if events else event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            given = f"one without the figures of an event ({type(error).__name__}: {error})"
            raise broken_line(path, number, given) from error
        events.append(event)
    return events, cut


def _check_figures(line: Mapping[str, Any]) -> None:
    """Check the types of what drawing relies on.

    Raises:
        KeyError: If a figure is missing.
        TypeError: If a figure is not a number.
        ValueError: If a step, a count or a rank is below 0.
    """
    figures = [line["step"], line["parameters"]]
    for layer in line["layers"].values():
        figures += [layer["rank_before"], layer["rank_after"]]
    if not all(isinstance(figure, int) for figure in figures):
        raise TypeError("step, parameters and ranks must be whole numbers")
    if not isinstance(line["agreement"], int | float):
        raise TypeError("agreement must be a number")
    if min(figures) < 0:
        raise ValueError("step, parameters and ranks must be at least 0")


def _check_order(event: Event, past: Event) -> None:
    """Check that an event follows on the one before.

    Raises:
        ValueError: If it is earlier, or of other layers.
    """
    if event.layers.keys() != past.layers.keys() or not event.layers or event.step < past.step:
        raise ValueError("layers must be those of the line before, and steps in order")
