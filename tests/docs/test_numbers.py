"""The numbers of `docs/why.md`, and of tasks of the screen in other pages, are the records'."""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/why.md").read_text(encoding="utf-8")
ARMS = (
    "dynamic", "pattern", "pattern_slow", "permuted", "random", "refresh", "pace", "rule",
)  # fmt: skip
"""In the order of the table."""
CELLS = [(task, r) for task in ("reviews", "questions") for r in ("2", "4")]


def mean_losses():
    """Return the mean test loss of the final runs by task, rank and arm."""
    with (ROOT / "benchmarks/results/controls.csv").open(encoding="utf-8") as file:
        runs = [run for run in csv.DictReader(file) if run["kind"] == "final"]
    losses = {}
    for run in runs:
        key = (run["task"], run["r"], run["arm"])
        losses.setdefault(key, []).append(float(run["test_loss"]))
    assert {len(values) for values in losses.values()} == {10}
    return {key: fmean(values) for key, values in losses.items()}


def test_the_table_and_the_shares_are_those_of_the_record():
    loss = mean_losses()
    rows = [line.split("|")[2:-1] for line in PAGE.splitlines() if re.match(r"\| [a-z]", line)][1:]
    for arm, row in zip(ARMS, rows, strict=True):
        for cell, shown in zip(CELLS, row, strict=True):
            plain = loss[*cell, "lora"]
            change = 100 * (loss[*cell, arm] / plain - 1)
            assert shown.replace("*", "").replace("−", "-").strip() == f"{change:+.1f}", (arm, cell)

    def shares(*arms):
        gains = {cell: loss[*cell, "lora"] - loss[*cell, "dynamic"] for cell in CELLS}
        values = [(loss[*c, "lora"] - loss[*c, arm]) / gains[c] for arm in arms for c in CELLS]
        return round(100 * min(values)), round(100 * max(values))

    text = " ".join(PAGE.split())
    assert "Where ranks end is {} to {} % of the gain".format(*shares("pattern")) in text
    assert "is {} to {} %. Dynamic".format(*shares("permuted", "random")) in text
    assert f"New directions are {shares('refresh')[1]} % at most" in text


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


def searched_budgets():
    """Return the percent lost by a searched budget and of parameters kept, and the first loss."""
    with (ROOT / "benchmarks/results/screen.csv").open(encoding="utf-8") as file:
        runs = [run for run in csv.DictReader(file) if run["kind"] == "final"]
    found = {}
    for task in dict.fromkeys(run["task"] for run in runs):
        auto, ceiling = (
            [run for run in runs if (run["task"], run["arm"]) == (task, arm)]
            for arm in ("auto", "ceiling")
        )
        if {run["seed"] for run in auto} != {run["seed"] for run in ceiling} or len(auto) != 5:
            continue
        auto, ceiling = (sorted(part, key=lambda run: run["seed"]) for part in (auto, ceiling))
        pairs = [
            (float(run["loss"]), float(other["loss"]), float(run["start_loss"]))
            for run, other in zip(auto, ceiling, strict=True)
        ]
        lost = fmean(100 * (loss - least) / (start - least) for loss, least, start in pairs)
        start = fmean(start for _, _, start in pairs)
        kept = median(int(run["parameters"]) for run in auto) / int(ceiling[0]["parameters"])
        found[task] = lost, 100 * kept, start
    return found


def test_what_a_searched_budget_loses_and_keeps_is_that_of_the_record():
    found = searched_budgets()
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (yes|no) \| (\S+) \| (\d+) \|$", page, re.MULTILINE)
    losses = runs_of_the_screen()

    def helps(task):
        return fmean(losses[task]["wide"]) <= 0.98 * fmean(losses[task]["uniform"])

    assert {task: told for task, *told in rows} == {
        task: ["yes" if helps(task) else "no", f"{lost:.1f}".replace("-", "−"), f"{kept:.0f}"]
        for task, (lost, kept, _) in found.items()
    }
    start, uniform = found["digits"][2], fmean(losses["digits"]["uniform"])
    least = fmean(losses["digits"]["ceiling"][:3])
    assert f"loses {100 * (uniform - least) / (start - least):.1f} % (three seeds)" in page
    kept = [value for _, value, _ in found.values()]
    shares = f"{min(kept):.0f} to {max(kept):.0f} %", f"{median(kept):.0f} %"
    log, readme = (
        " ".join((ROOT / page).read_text(encoding="utf-8").split())
        for page in ("docs/log.md", "README.md")
    )
    most = max(lost for lost, _, _ in found.values())
    assert (
        f"{len(found)} tasks, five seeds: at most {most:.1f} % of the reduction is lost, "
        "with {} of the parameters (median {})".format(*shares)
    ) in log
    held = sum(lost <= 1 for lost, _, _ in found.values())
    assert f"gain on {held} of {len(found)} tasks, with {shares[0]} of its parameters" in readme


def test_the_lowest_sufficient_rank_is_that_of_the_record():
    losses, smaller, shares = runs_of_the_screen(), 0, []
    for task, (_, kept, start) in searched_budgets().items():
        least = losses[task]["ceiling"][:3]
        most = fmean(least) + 0.01 * (start - fmean(least))
        ranks = {2: losses[task]["uniform"], 8: losses[task]["wide"], 16: least}
        shares.append(100 * min(r for r, found in ranks.items() if fmean(found) <= most) / 16)
        smaller += shares[-1] < kept
    log = " ".join((ROOT / "docs/log.md").read_text(encoding="utf-8").split())
    assert f"chosen with hindsight) has {median(shares):.0f} % of the parameters" in log
    assert (smaller, len(shares)) == (4, 8)
    assert "It has fewer on four of eight tasks." in log


def test_what_resize_loses_on_adapters_that_chose_no_rule_is_that_of_the_record():
    record = json.loads((ROOT / "benchmarks/results/resize_others.json").read_text())
    found = {(row["run"], row["directions"], row["ranks"]): row for row in record["results"]}
    page = (ROOT / "docs/adapters.md").read_text(encoding="utf-8")
    for label, run in (
        ("MiniLM, MRPC, another seed", "mrpc32-1"),
        ("SmolLM2, 960 rows of E2E NLG", "e2e32-0"),
        ("vision transformer, ants or bees", "ants32-0"),
    ):
        cut, plain = found[run, "outputs", "output energy by norm"], found[run, "SVD", "one rank"]
        told = [
            f"{100 * cut['output']:.2f} % ({100 * plain['output']:.2f})",
            f"{1000 * cut['divergence']:.1f} ({1000 * plain['divergence']:.1f})",
            f"{cut['accuracy']:.3f} ({plain['accuracy']:.3f})",
            f"{found[run, 'whole', 'whole']['accuracy']:.3f}",
        ]
        assert f"| {label} | {' | '.join(told)} |" in page
