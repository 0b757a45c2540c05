"""`metrics.jsonl` and `ranks.jsonl` of a run, each line checked for what drawing relies on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora.files.json_files import broken_line, read_lines
from dynlora.report.plain_files import is_number
from dynlora.types import Event

COUNTS = ("rank_before", "rank_after")
"""Whole numbers of a layer in an event."""
FIGURES = ("share", "weight", "output_lost")
"""Its numbers."""
MISSING = ("score", "variance", "effective_rank", "directions")
"""Its numbers that may be null."""


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return what was logged, and whether the last line was cut short.

    Raises:
        RunFileError: If a whole line is not a JSON object with a step.
    """
    lines, cut = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not _is_count(line.get("step")):
            raise broken_line(path, number, f"step {str(line.get('step'))[:40]!r}")
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
        TypeError: If a figure is not of its type, or below 0 where it counts something.
    """
    counts, figures = [line["step"], line["parameters"]], [line["agreement"]]
    for layer in line["layers"].values():
        counts += [layer[key] for key in COUNTS]
        figures += [layer[key] for key in FIGURES]
        figures += [layer[key] for key in MISSING if layer.get(key) is not None]
        if not isinstance(layer["waits"], bool):
            raise TypeError("waits must be true or false")
    if not all(map(_is_count, counts)):
        raise TypeError("step, parameters and ranks must be whole numbers of at least 0")
    if not all(map(is_number, figures)):
        raise TypeError("agreement and the layers' figures must be finite numbers")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _check_order(event: Event, past: Event) -> None:
    """Check that an event follows on the one before.

    Raises:
        ValueError: If it is earlier, or of other layers.
    """
    if event.layers.keys() != past.layers.keys() or not event.layers or event.step < past.step:
        raise ValueError("layers must be those of the line before, and steps in order")
