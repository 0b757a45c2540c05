"""`metrics.jsonl` and `ranks.jsonl` of a run: read them, and check the values in each line."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from dynlora.files.json_files import broken_line, read_lines
from dynlora.history import Event
from dynlora.runs.record import check_kind

_AT_LAST = {"train_runtime", "best_loss"}  # keys of lines written after a run's last step
TAIL = 200  # bytes before the end of what was read, which a replaced file does not have there
Line = TypeVar("Line")


class Lines(Generic[Line]):
    """The checked lines of a file that may grow: each complete line is read once."""

    def __init__(self, path: Path, check: Callable[[dict[str, Any], Line | None], Line]) -> None:
        """Prepare an empty list; `check` converts an object, beside the line before it."""
        self.path = path
        self.found: list[Line] = []
        self.cut = False  # whether the last line is incomplete, and left out
        self._check = check
        self._end, self._seen = 0, b""

    def read(self) -> "Lines[Line]":
        """Add the new lines, or read all lines of a replaced file; return this object.

        Raises `RunFileError` if a line is malformed.
        """
        if self._tail() != self._seen:
            self.found, self._end = [], 0
        objects, self.cut, end = read_lines(self.path, self._end, len(self.found) + 1)
        past, new = self.found[-1] if self.found else None, []
        for number, line in enumerate(objects, start=len(self.found) + 1):
            try:
                past = self._check(line, past)
            except ValueError as error:
                raise broken_line(self.path, number, str(error)) from error
            new.append(past)
        self.found += new
        self._end = end
        self._seen = self._tail()
        return self

    def _tail(self) -> bytes:
        """Return the last bytes of what was read, as they are in the file now."""
        with suppress(OSError), self.path.open("rb") as file:
            file.seek(max(0, self._end - TAIL))
            return file.read(min(TAIL, self._end))
        return b""


def metric_lines(path: Path) -> Lines[dict[str, Any]]:
    """Return the logged metrics, not read yet."""
    return Lines(path, _checked_metrics)


def event_lines(path: Path) -> Lines[Event]:
    """Return the events, not read yet."""
    return Lines(path, _checked_event)


def metrics_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Return the metrics up to a step, without the final lines of a finished run."""
    lines = metric_lines(path).read().found
    return [line for line in lines if line["step"] <= step and not line.keys() & _AT_LAST]


def _checked_metrics(line: dict[str, Any], _: dict[str, Any] | None) -> dict[str, Any]:
    step = line.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"step {str(step)[:40]!r}")
    return line


def _checked_event(line: dict[str, Any], past: Event | None) -> Event:
    """Return an event after a check of its values' range, and that it fits the previous event."""
    try:
        event: Event = check_kind(line, Event, "event")
        layers = event.layers.values()
        counts = [event.step, event.parameters]
        counts += [rank for layer in layers for rank in (layer.rank_before, layer.rank_after)]
        if min(counts) < 0:
            raise ValueError("`step`, `parameters` and ranks must be at least 0")
        past = past or event
        if event.layers.keys() != past.layers.keys() or not event.layers or event.step < past.step:
            raise ValueError("`layers` must be those of the line before, and `step` in order")
    except ValueError as error:
        raise ValueError(f"one that is not an event ({str(error)[:300]})") from error
    return event
