"""Tables of a screen: whether rank binds and the need is uneven, and what `r: auto` needs.

    python -m benchmarks.last_blocks.screen_report benchmarks/results/screen.csv

Prints Markdown, and the tasks that enter the comparison in `natural.toml`. The study's file defines
the criteria; a missing run leaves its cell empty.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.last_blocks.arms import ALLOCATIONS, AUTO, CEILING, UNIFORM, WIDE
from benchmarks.last_blocks.runs import loss_in
from benchmarks.resumable.appended import Row, read_rows, select

BINDS = 0.02
"""Least relative gain of more rank for criterion a."""
UNEVEN = 0.01
"""Least relative gain of a fixed allocation for criterion b."""
ONLY_BINDS, BOTH = "a", "a, b"
OTHERS = 3
"""Number of tasks in the comparison that meet criterion a only."""
HEAD = """\
| task | tokens per parameter | loss, exact at r | at 4 r | gain of 4 r (seeds) | allocation | \
its gain (seeds) | meets |
|---|---|---|---|---|---|---|---|"""
NEED_HEAD = """\
| task | loss, exact at the ceiling | with `auto` | part of the reduction lost (seeds worse) | \
parameters | of the ceiling's |
|---|---|---|---|---|---|"""
NO = ""
"""Cell without a value."""


def final(rows: Sequence[Row], task: str, arm: str, value: str = "loss") -> dict[int, float]:
    """Return a value of the final runs by seed."""
    found = select(rows, kind="final", task=task, arm=arm)
    return {row["seed"]: float(row[value]) for row in found}


def best_allocation(rows: Sequence[Row], task: str) -> str | None:
    """Return the fixed allocation with the lowest loss of its trials; None before all are tuned."""
    losses = {}
    for arm in ALLOCATIONS:
        found = select(rows, kind="trial", task=task, arm=arm)
        losses[arm] = min(map(loss_in, found), default=math.inf)
    return min(losses, key=losses.__getitem__) if max(losses.values()) < math.inf else None


def gain(rows: Sequence[Row], task: str, arm: str | None) -> tuple[float, str] | None:
    """Return the mean relative gain over `uniform`, and the seeds above 0; None without runs."""
    uniform = final(rows, task, UNIFORM)
    other = final(rows, task, arm) if arm else {}
    seeds = sorted(uniform.keys() & other.keys())
    if not seeds:
        return None
    unit = float(np.mean([uniform[seed] for seed in seeds]))
    gains = [(uniform[seed] - other[seed]) / unit for seed in seeds]
    return float(np.mean(gains)), f"{sum(g > 0 for g in gains)} of {len(seeds)}"


def meets(rows: Sequence[Row], task: str) -> str | None:
    """Return the criteria that a task meets: `none`, `a` or both; None before they are measured.

    Criterion b is not needed where rank does not bind.
    """
    binds = gain(rows, task, WIDE)
    if binds is None or binds[0] < BINDS:
        return None if binds is None else "none"
    uneven = gain(rows, task, best_allocation(rows, task))
    if uneven is None:
        return None
    return BOTH if uneven[0] >= UNEVEN else ONLY_BINDS


def entering(rows: Sequence[Row]) -> list[str]:
    """Return the tasks that meet both criteria, and those with the shortest runs that meet a."""
    found = {row["task"]: meets(rows, row["task"]) for row in rows}
    others = [task for task in found if found[task] == ONLY_BINDS]
    others.sort(key=lambda task: np.mean([*final(rows, task, UNIFORM, "seconds").values()]))
    return [task for task in found if found[task] == BOTH] + others[:OTHERS]


def line(rows: Sequence[Row], task: str) -> str:
    """Return the table's line of a task."""
    best = best_allocation(rows, task)
    wide, uneven = gain(rows, task, WIDE), gain(rows, task, best)
    size = final(rows, task, UNIFORM, "tokens_per_parameter")
    cells = [task, f"{np.mean(list(size.values())):.1f}" if size else NO]
    for arm in (UNIFORM, WIDE):
        losses, exact = final(rows, task, arm), final(rows, task, arm, "exact")
        shown = [f"{np.mean(list(values.values())):.4f}" for values in (losses, exact) if values]
        cells.append(", ".join(shown))
    cells += [f"{wide[0]:+.1%} ({wide[1]})" if wide else NO, best or NO]
    cells.append(f"{uneven[0]:+.1%} ({uneven[1]})" if uneven else NO)
    cells.append(meets(rows, task) or NO)
    return f"| {' | '.join(cells)} |"


def need_line(rows: Sequence[Row], task: str) -> str:
    """Return the line of a task in the table of `r: auto`."""
    ceiling, auto = final(rows, task, CEILING), final(rows, task, AUTO)
    start = final(rows, task, AUTO, "start_loss")
    seeds = sorted(ceiling.keys() & auto.keys())
    lost = [(auto[seed] - ceiling[seed]) / (start[seed] - ceiling[seed]) for seed in seeds]
    cells = [task]
    for arm in (CEILING, AUTO):
        values = [final(rows, task, arm, value) for value in ("loss", "exact")]
        means = [np.mean([found[seed] for seed in seeds]) for found in values]
        cells.append(", ".join(f"{mean:.4f}" for mean in means))
    cells.append(f"{np.mean(lost):+.1%} ({sum(x > 0 for x in lost)} of {len(seeds)})")
    used, most = (final(rows, task, arm, "parameters") for arm in (AUTO, CEILING))
    median = np.median([used[seed] for seed in seeds])
    cells += [f"{median:,.0f}", f"{median / most[seeds[0]]:.1%}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables of a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    rows = read_rows(parser.parse_args().record)
    print(HEAD)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for task in tasks:
        print(line(rows, task))
    print(f"\nThe comparison: {', '.join(entering(rows))}\n\n{NEED_HEAD}")
    for task in tasks:
        if final(rows, task, AUTO) and final(rows, task, CEILING):
            print(need_line(rows, task))


if __name__ == "__main__":
    main()
