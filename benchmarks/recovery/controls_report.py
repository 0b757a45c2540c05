"""Tables of a study of control arms: differences from LoRA and from the default, and shares.

    python -m benchmarks.recovery.controls_report benchmarks/results/controls.csv

Prints Markdown. The study's file defines metric, intervals and correction.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness.report.statistics import SEED, bootstrap_interval, holm, sign_flip_p
from benchmarks.resumable.appended import Row, read_rows

RESAMPLES = 10_000
METRIC = "test_loss"
REFERENCES = ("lora", "dynamic")
Losses = Mapping[int, float]
"""Loss by seed."""
Cell = tuple[str, int]
"""Task and rank."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired differences of an arm from another in one cell, relative to the unit's mean loss."""

    cell: Cell
    arm: str
    other: str
    pairs: int
    mean: float
    interval: tuple[float, float]
    p: float
    share: tuple[float, float, float] | None
    """Share of the gain of the whole over the unit, and its interval."""


def losses_by_arm(rows: Iterable[Row], metric: str) -> dict[Cell, dict[str, dict[int, float]]]:
    """Return the final losses by cell, arm and seed."""
    found: dict[Cell, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row["kind"] == "final":
            arms = found.setdefault((row["task"], row["r"]), {})
            arms.setdefault(row["arm"], {})[row["seed"]] = float(row[metric])
    return found


def compare(
    cell: Cell,
    arms: Mapping[str, Losses],
    arm: str,
    other: str,
    *,
    unit: str = "lora",
    whole: str = "dynamic",
) -> Comparison | None:
    """Compare two arms on their common seeds; None with fewer than two.

    Args:
        cell: Task and rank.
        arms: Losses by arm.
        arm: The first arm.
        other: The second arm, which is subtracted.
        unit: Arm whose mean loss is the unit.
        whole: Arm whose gain over `unit` is the whole in `share`.
    """
    seeds = sorted(set(arms.get(arm, {})) & set(arms.get(other, {})) & set(arms.get(unit, {})))
    if len(seeds) < 2:
        return None
    loss = float(np.mean([arms[unit][seed] for seed in seeds]))
    differences = [(arms[arm][seed] - arms[other][seed]) / loss for seed in seeds]
    return Comparison(
        cell=cell,
        arm=arm,
        other=other,
        pairs=len(seeds),
        mean=float(np.mean(differences)),
        interval=bootstrap_interval(differences),
        p=sign_flip_p(differences),
        share=share_of_gain(arms, arm, unit, whole) if other == unit else None,
    )


def share_of_gain(
    arms: Mapping[str, Losses], arm: str, unit: str, whole: str
) -> tuple[float, float, float] | None:
    """Return (unit - arm) / (unit - whole) with its 95 % percentile bootstrap interval."""
    base, best = arms[unit], arms.get(whole, {})
    seeds = sorted(set(arms[arm]) & set(best) & set(base))
    if len(seeds) < 2:
        return None
    mine = np.array([base[seed] - arms[arm][seed] for seed in seeds])
    gain = np.array([base[seed] - best[seed] for seed in seeds])
    drawn = np.random.default_rng(SEED).integers(len(seeds), size=(RESAMPLES, len(seeds)))
    shares = mine[drawn].mean(axis=1) / gain[drawn].mean(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(mine.mean() / gain.mean()), float(low), float(high)


def comparisons_in(cell: Cell, arms: Mapping[str, Losses]) -> list[Comparison]:
    """Compare every arm of a cell with LoRA and with the default."""
    made = [
        compare(cell, arms, arm, other)
        for other in REFERENCES
        for arm in arms
        if arm != other and (arm, other) != ("lora", "dynamic")
    ]
    return [comparison for comparison in made if comparison is not None]


def table(found: Mapping[Cell, Mapping[str, Losses]]) -> str:
    """Return a Markdown table of all comparisons, with p-values corrected per cell."""
    lines = [
        "| task | r | arm | against | pairs | difference (95 %) | corrected p | share (95 %) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, arms in found.items():
        comparisons = comparisons_in(cell, arms)
        corrected = holm([comparison.p for comparison in comparisons])
        lines += [_line(*pair) for pair in zip(comparisons, corrected, strict=True)]
    return "\n".join(lines)


def _line(found: Comparison, corrected: float) -> str:
    low, high = found.interval
    share = "" if found.share is None else "{:.2f} ({:.2f} to {:.2f})".format(*found.share)
    return (
        f"| {found.cell[0]} | {found.cell[1]} | {found.arm} | {found.other} | {found.pairs} | "
        f"{found.mean:+.2%} ({low:+.2%} to {high:+.2%}) | {corrected:.3f} | {share} |"
    )


def settings(rows: Iterable[Row]) -> str:
    """Return a Markdown table of chosen settings, changed directions and runs that moved."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "final":
            groups.setdefault((row["task"], row["r"], row["arm"]), []).append(row)
    lines = [
        "| task | r | arm | learning rate | scale | runs | moved | directions changed | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, r, arm), group in groups.items():
        moved = sum(bool(row["moved"]) for row in group)
        changed = np.mean([row["grown"] + row["refreshed"] for row in group])
        loss = np.mean([row[METRIC] for row in group])
        lines.append(
            f"| {task} | {r} | {arm} | {group[0]['learning_rate']:g} | {group[0]['scale']:g} | "
            f"{len(group)} | {moved} | {changed:.1f} | {loss:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print all tables of a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--metric", default=METRIC, help="column to compare")
    options = parser.parse_args()
    rows = read_rows(options.record)
    print(settings(rows), "\n")
    print(table(losses_by_arm(rows, options.metric)))


if __name__ == "__main__":
    main()
