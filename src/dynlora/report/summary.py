"""The table at the end of a run: what the user came for, on one screen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from dynlora.report.names import short_names

METRICS = ("accuracy", "f1", "matthews", "loss")
MOVERS = 3
"""Layers named among those that gained most, and among those that lost most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What a finished run has to say."""

    method: str
    before: Mapping[str, float]
    """Validation metrics before training."""
    after: Mapping[str, float]
    """Validation metrics of the model that was saved."""
    budget: int
    """Parameters that the method may use."""
    parameters: int
    """Parameters in use at the end."""
    peak_parameters: int
    """Most parameters in use at any time."""
    initial_ranks: Mapping[str, int]
    """Rank by module name at the start; empty where ranks do not move."""
    final_ranks: Mapping[str, int]
    """Rank by module name at the end; empty where ranks do not move."""
    events: int
    """How often ranks could move."""
    train_seconds: float
    """Time in optimizer steps, in seconds."""
    dynamic_seconds: float
    """Part of `train_seconds` spent in moving ranks."""
    places: Mapping[str, Path]
    """What was written where."""


def summary_table(report: RunReport) -> Table:
    """Return the report as a table of two columns, ready to print."""
    table = Table(title=f"dynlora: method {report.method}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name in METRICS:
        if name in report.before and name in report.after:
            table.add_row(name, f"{report.before[name]:.4f} → {report.after[name]:.4f}")
    share = report.parameters / report.budget
    kind = "trained parameters" if report.method == "full" else "LoRA parameters"
    table.add_row(
        kind,
        f"{report.parameters:,} of a budget of {report.budget:,} ({share:.1%}), "
        f"peak {report.peak_parameters:,}",
    )
    for label, text in _rank_rows(report):
        table.add_row(label, text)
    table.add_row("time in training steps", f"{report.train_seconds:.1f} s")
    if report.final_ranks:
        part = report.dynamic_seconds / report.train_seconds if report.train_seconds else 0.0
        table.add_row("time in the dynamic part", f"{report.dynamic_seconds:.2f} s ({part:.2%})")
    for what, where in report.places.items():
        table.add_row(what, str(where))
    return table


def _rank_rows(report: RunReport) -> list[tuple[str, str]]:
    ranks = report.final_ranks
    if not ranks:
        return []
    low, middle, high = min(ranks.values()), median(ranks.values()), max(ranks.values())
    moves = {name: rank - report.initial_ranks[name] for name, rank in ranks.items()}
    by_move = sorted(moves, key=lambda name: moves[name])
    lost = [name for name in by_move[:MOVERS] if moves[name] < 0]
    gained = [name for name in reversed(by_move[-MOVERS:]) if moves[name] > 0]
    return [
        ("ranks", f"lowest {low}, median {middle:g}, highest {high}; {report.events} events"),
        ("gained most", _movers(gained, report)),
        ("lost most", _movers(lost, report)),
    ]


def _movers(names: Sequence[str], report: RunReport) -> str:
    short = short_names(list(report.final_ranks))
    moves = [
        f"{short[name]} {report.initial_ranks[name]} → {report.final_ranks[name]}" for name in names
    ]
    return ", ".join(moves) or "none"
