"""Results of a finished run, and the table that `train` prints on 80 columns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from dynlora.report.layers import short_names
from dynlora.types import Event, moved, stillness

MOVERS = 3
"""Maximum number of layers listed as gaining most and as losing most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Results of a finished run."""

    method: str
    before: Mapping[str, float]
    """Validation metrics before training."""
    after: Mapping[str, float]
    """Validation metrics of the saved model."""
    budget: int
    """Maximum number of parameters for the method."""
    parameters: int
    """Parameters in use at the end."""
    peak_parameters: int
    """Maximum number of parameters in use."""
    initial_ranks: Mapping[str, int]
    """Rank by module name at the start; empty for methods with fixed ranks."""
    final_ranks: Mapping[str, int]
    """Rank by module name at the end; empty for methods with fixed ranks."""
    events: Sequence[Event]
    """Events at which ranks could change; empty for methods with fixed ranks."""
    train_seconds: float
    """Seconds in optimizer steps."""
    dynamic_seconds: float
    """Seconds of the dynamic part, included in `train_seconds`."""
    places: Mapping[str, Path]
    """Written files and folders, by label."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, with counts of events in place of the events."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        events = values.pop("events")
        values["places"] = {what: str(where) for what, where in self.places.items()}
        return values | {"events": len(events), "events_that_moved": sum(map(moved, events))}


def result_table(result: RunResult) -> Table:
    """Return the results as a table of two columns."""
    table = Table(title=f"dynlora train: method {result.method}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for rows in (_metric_rows, _parameter_rows, _rank_rows, _time_rows, _place_rows):
        for label, text in rows(result):
            table.add_row(label, Text(text))  # plain: paths may contain rich's square brackets
        table.add_section()
    return table


def _metric_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    for name, after in result.after.items():
        text = f"{after:.4f}"
        before = result.before.get(name)
        if before is not None:  # None if the metric was not finite
            text = f"{before:.4f} → {text} ({after - before:+.4f})"
        yield f"validation {name}", text


def _parameter_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    if result.method == "full":
        yield "trained parameters", f"{result.parameters:,}"
        return
    share = result.parameters / result.budget if result.budget else 0.0
    text = f"{result.parameters:,} of the budget of {result.budget:,} ({share:.1%})"
    yield "live LoRA parameters", text
    if result.peak_parameters != result.parameters:
        yield "at their peak", f"{result.peak_parameters:,}"


def _rank_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    ranks = result.final_ranks
    if not ranks:
        return
    low, middle, high = min(ranks.values()), median(ranks.values()), max(ranks.values())
    yield "ranks", f"lowest {low}, median {middle:g}, highest {high}"
    still = stillness(result.events)
    if still is not None:
        yield "ranks did not move", still
        return
    count = sum(moved(event) for event in result.events)
    moves = {name: rank - result.initial_ranks[name] for name, rank in ranks.items()}
    up, down = sum(move > 0 for move in moves.values()), sum(move < 0 for move in moves.values())
    yield "ranks moved", f"at {count} of {len(result.events)} events: {up} layers up, {down} down"
    by_gain = sorted(moves, key=lambda name: -moves[name])
    yield "gained most", _movers([n for n in by_gain[:MOVERS] if moves[n] > 0], result)
    yield "lost most", _movers([n for n in by_gain[: -MOVERS - 1 : -1] if moves[n] < 0], result)


def _movers(names: Sequence[str], result: RunResult) -> str:
    """Return a line per layer with its short name, first and last rank."""
    short = short_names(list(result.final_ranks))
    width = max((len(short[name]) for name in names), default=0)
    lines = [
        f"{short[n]:<{width}}  {result.initial_ranks[n]} → {result.final_ranks[n]}" for n in names
    ]
    return "\n".join(lines) or "none"


def _time_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    yield "training steps", f"{result.train_seconds:.1f} s"
    if result.final_ranks:
        part = result.dynamic_seconds / result.train_seconds if result.train_seconds else 0.0
        yield "of it dynamic part", f"{result.dynamic_seconds:.2f} s ({part:.2%})"


def _place_rows(result: RunResult) -> Iterator[tuple[str, str]]:
    for what, where in result.places.items():
        yield what, str(where)
