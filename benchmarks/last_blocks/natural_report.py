"""Tables of the comparison on natural tasks: dynamic ranks, a falling budget, and all arms.

    python -m benchmarks.last_blocks.natural_report benchmarks/results/natural.csv

Prints Markdown. The study's file defines metric, intervals, correction and claims.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness.report.statistics import holm
from benchmarks.last_blocks.arms import DOUBLE, DYNAMIC, FALLING, UNIFORM
from benchmarks.last_blocks.screen_report import meets
from benchmarks.recovery.controls_report import Cell, Comparison, Losses, compare, losses_by_arm
from benchmarks.resumable.appended import Row, read_rows, select

SIGNIFICANT = 0.05
HALF = 0.5
"""Least part of the gain of rank 2 r that a win needs."""
DYNAMIC_HEAD = """\
| task | screen | pairs | `dynamic` against LoRA at r (95 %) | corrected p | \
share of the gain of 2 r (95 %) | claim |
|---|---|---|---|---|---|---|"""
FALLING_HEAD = """\
| task | screen | pairs | better arm | `falling` against it (95 %) | corrected p |
|---|---|---|---|---|---|"""
RANDOM = "random"
RANDOM_HEAD = """\
| task | pairs | `dynamic` against `random` (95 %) |
|---|---|---|"""
ARMS_HEAD = """\
| task | arm | learning rate of trials | runs | moved | loss | exact | \
against LoRA at r (95 %) | parameters | at the peak | tokens per parameter |
|---|---|---|---|---|---|---|---|---|---|---|"""
Found = Mapping[Cell, Mapping[str, Losses]]
"""Losses of the final runs by cell and arm."""


def against(found: Found, cell: Cell, arm: str, other: str) -> Comparison | None:
    """Compare two arms in units of LoRA at r; the share is that of the gain of rank 2 r."""
    return compare(cell, found[cell], arm, other, unit=UNIFORM, whole=DOUBLE)


def claim(comparison: Comparison, corrected: float, doubled: Comparison | None) -> str:
    """Return the claim that `dynamic` against LoRA at r supports, given 2 r against r."""
    low, high = comparison.interval
    if corrected > SIGNIFICANT or low <= 0 <= high:
        return "undecided"
    if low > 0:
        return "worse"
    return "win" if doubled and comparison.mean <= HALF * doubled.mean else "undecided"


def dynamic_lines(found: Found, screened: Sequence[Row]) -> list[str]:
    """Return the lines of `dynamic` against LoRA at r, with p-values corrected over the tasks."""
    made = [against(found, cell, DYNAMIC, UNIFORM) for cell in found]
    comparisons = [comparison for comparison in made if comparison]
    lines = []
    for comparison, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True):
        share = "{:.2f} ({:.2f} to {:.2f})".format(*comparison.share) if comparison.share else ""
        doubled = against(found, comparison.cell, DOUBLE, UNIFORM)
        cells = [*_start(comparison, screened), _shown(comparison), f"{p:.3f}", share]
        lines.append(_line(*cells, claim(comparison, p, doubled)))
    return lines


def falling_lines(found: Found, screened: Sequence[Row]) -> list[str]:
    """Return the lines of `falling` against the better of LoRA and `dynamic`, and their mean."""
    made = []
    for cell, arms in found.items():
        means = {a: np.mean([*arms[a].values()]) for a in (UNIFORM, DYNAMIC) if a in arms}
        made.append(against(found, cell, FALLING, min(means, key=means.__getitem__)))
    comparisons = [comparison for comparison in made if comparison]
    lines = [
        _line(*_start(comparison, screened), comparison.other, _shown(comparison), f"{p:.3f}")
        for comparison, p in zip(comparisons, holm([c.p for c in comparisons]), strict=True)
    ]
    if comparisons:
        mean = np.mean([comparison.mean for comparison in comparisons])
        lines.append(_line("mean", "", "", "", f"{mean:+.2%}", ""))
    return lines


def random_lines(found: Found) -> list[str]:
    """Return the lines of `dynamic` against random importance; there are none without its runs."""
    made = [against(found, cell, DYNAMIC, RANDOM) for cell in found]
    return [_line(c.cell[0], str(c.pairs), _shown(c)) for c in made if c]


def arm_lines(found: Found, rows: Sequence[Row]) -> list[str]:
    """Return a line per task and arm."""
    lines = []
    for cell, arm in ((cell, arm) for cell, arms in found.items() for arm in arms):
        runs = select(rows, kind="final", task=cell[0], arm=arm)
        rates = [row["learning_rate"] for row in select(rows, kind="trial", task=cell[0], arm=arm)]
        mean = {
            key: np.mean([row[key] for row in runs if row[key] is not None])
            for key in ("loss", "exact", "parameters", "peak_parameters", "tokens_per_parameter")
        }
        comparison = against(found, cell, arm, UNIFORM) if arm != UNIFORM else None
        lines.append(
            _line(
                cell[0],
                arm,
                f"{runs[0]['learning_rate']:.2g} of {min(rates):.2g} to {max(rates):.2g}",
                str(len(runs)),
                str(sum(row["moved"] for row in runs)),
                f"{mean['loss']:.4f}",
                f"{mean['exact']:.4f}",
                _shown(comparison) if comparison else "",
                f"{mean['parameters']:,.0f}",
                f"{mean['peak_parameters']:,.0f}",
                f"{mean['tokens_per_parameter']:.1f}",
            )
        )
    return lines


def split_moved(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return rows without the runs of `dynamic` that moved no rank, and without its others."""
    still = [row for row in rows if row["arm"] != DYNAMIC or not row["moved"]]
    return [row for row in rows if row["arm"] != DYNAMIC or row["moved"]], still


def _start(comparison: Comparison, screened: Sequence[Row]) -> list[str]:
    task = comparison.cell[0]
    return [task, meets(screened, task) or "", str(comparison.pairs)]


def _shown(comparison: Comparison) -> str:
    low, high = comparison.interval
    return f"{comparison.mean:+.2%} ({low:+.2%} to {high:+.2%})"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print all tables of a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--screen", type=Path, default=Path("benchmarks/results/screen.csv"))
    options = parser.parse_args()
    rows, screened = read_rows(options.record), read_rows(options.screen)
    found = losses_by_arm(rows, "loss")
    print("\n".join([DYNAMIC_HEAD, *dynamic_lines(found, screened)]))
    if select(rows, kind="final", arm=DYNAMIC, moved=False):
        titles = ("in which ranks moved", "in which no rank moved")
        for title, kept in zip(titles, split_moved(rows), strict=True):
            lines = dynamic_lines(losses_by_arm(kept, "loss"), screened)
            print("\n".join([f"\nOnly runs of `dynamic` {title}:\n", DYNAMIC_HEAD, *lines]))
    print("\n".join(["", FALLING_HEAD, *falling_lines(found, screened)]))
    if lines := random_lines(found):
        print("\n".join(["", RANDOM_HEAD, *lines]))
    print("\n".join(["", ARMS_HEAD, *arm_lines(found, rows)]))


if __name__ == "__main__":
    main()
