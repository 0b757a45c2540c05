"""Read `metrics.jsonl` and `ranks.jsonl` of a run and check the values that drawings use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynlora.files.json_files import broken_line, read_lines
from dynlora.runs.values import is_number
from dynlora.types import Event

COUNTS = ("rank_before", "rank_after")
"""Whole numbers per layer and event."""
FIGURES = ("share", "weight", "output_lost")
"""Numbers per layer and event."""
MISSING = ("score", "variance", "effective_rank", "directions")
"""Numbers per layer and event that may be null."""


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the logged metrics, and whether the last line was cut short.

    Raises:
        RunFileError: If a complete line is not a JSON object with a step.
    """
    lines, cut = read_lines(path)
    for number, line in enumerate(lines, start=1):
        if not _is_count(line.get("step")):
            raise broken_line(path, number, f"step {str(line.get('step'))[:40]!r}")
    return lines, cut


def read_events(path: Path) -> tuple[list[Event], bool]:
    """Return the events, and whether the last line was cut short.

    Raises:
        RunFileError: If a complete line is not an event, or its layers or the order of steps do not
            match the previous line.
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
    """Check the types of the values that drawings use.

    Raises:
        KeyError: If a value is missing.
        TypeError: If a value has the wrong type or a count is negative.
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
    """Check that an event follows the previous one and has the same layers.

    Raises:
        ValueError: If its step is earlier or its layers differ.
    """
    if event.layers.keys() != past.layers.keys() or not event.layers or event.step < past.step:
        raise ValueError("layers must be those of the line before, and steps in order")
