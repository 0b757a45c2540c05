"""The table of `docs/log.md` on tasks short of rank has the figures of its record."""

import csv
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[2]


def runs_of_the_screen():
    """Return the losses of final runs by task and arm, in the order of their seeds."""
    with (ROOT / "benchmarks/results/screen.csv").open(encoding="utf-8") as file:
        runs = sorted(csv.DictReader(file), key=lambda run: int(run["seed"]))
    losses = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["kind"] == "final":
            losses[run["task"]][run["arm"]].append(float(run["loss"]))
    return losses


def shown(losses, arm):
    saved = [plain - other for plain, other in zip(losses["uniform"], losses[arm], strict=True)]
    percent = 100 * fmean(saved) / fmean(losses["uniform"])
    return f"{percent:+.1f} ({sum(value > 0 for value in saved)})".replace("-", "−")


def test_the_gains_of_rank_and_of_fixed_allocations_are_those_of_the_record():
    text = (ROOT / "docs/log.md").read_text(encoding="utf-8")
    part = text.split("## Which tasks are short of rank")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\w+) \| (\S+ \(\d\)) \| (.+) \|$", part, re.MULTILINE)
    record = runs_of_the_screen()
    assert {task for task, _, _ in rows} == {task for task in record if "wide" in record[task]}
    for task, wide, allocation in rows:
        losses = record[task]
        assert wide == shown(losses, "wide"), task
        fixed = losses.keys() - {"uniform", "wide", "ceiling", "auto"}
        assert allocation == " ".join([f"{arm} {shown(losses, arm)}" for arm in fixed] or "–"), task
