"""Tables of the evaluation: accuracy by set of rows and arm, differences from LoRA, and ranks.

    python -m benchmarks.last_blocks.evaluation_report benchmarks/results/evaluation.csv

Prints Markdown. The study's file defines metric, intervals and correction.
"""

import argparse
import tomllib
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks.harness.report.statistics import bootstrap_interval, holm, sign_flip_p
from benchmarks.last_blocks.arms import AUTO, DYNAMIC, OPEN, UNIFORM
from benchmarks.last_blocks.evaluation import Evaluation
from benchmarks.resumable.appended import Row, read_rows, select

STUDY = Path("benchmarks/studies/evaluation.toml")
TEST = "test"
EXACT, ANSWERS = 1, 2
"""Places of accuracy and of the number of different answers in a judgement."""
Accuracies = dict[int, float]
"""Accuracy by seed."""


def accuracies(rows: Sequence[Row], task: str, arm: str, name: str) -> Accuracies:
    """Return the accuracy on a set of rows."""
    runs = select(rows, kind="final", task=task, arm=arm)
    return {row["seed"]: row["judged"][name][EXACT] for row in runs}


def drops(rows: Sequence[Row], task: str, arm: str, name: str) -> Accuracies:
    """Return the accuracy on `test` less that on another set."""
    test, other = (accuracies(rows, task, arm, each) for each in (TEST, name))
    return {seed: test[seed] - other[seed] for seed in test}


def differences(ours: Accuracies, theirs: Accuracies) -> list[float]:
    """Return differences paired by seed."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def question_lines(rows: Sequence[Row], study: Evaluation, question: str) -> list[str]:
    """Return the table of a question: sets of rows, arms, and paired differences in points.

    p-values are corrected over all sets of the question.
    """
    cells = [(task, name) for task in study.questions[question] for name in _sets(rows, task)]
    arms = _arms(rows, study, question)
    compared = [arm for arm in (DYNAMIC, AUTO, OPEN) if arm in arms]
    shown = {arm: _compared(rows, cells, arm) for arm in compared}
    head = ["task: set", *arms, *(f"{arm} - LoRA, points (95 %), p" for arm in compared)]
    lines = []
    for place, (task, name) in enumerate(cells):
        means = [_mean(accuracies(rows, task, arm, name)) for arm in arms]
        lines.append([f"{task}: {name}", *means, *(shown[arm][place] for arm in compared)])
    return _table(head, lines)


def _compared(rows: Sequence[Row], cells: Sequence[tuple[str, str]], arm: str) -> list[str]:
    """Return an arm's differences from LoRA with p-values corrected over all cells."""
    found = [
        differences(accuracies(rows, task, arm, name), accuracies(rows, task, UNIFORM, name))
        for task, name in cells
    ]
    tested = [place for place, pairs in enumerate(found) if len(pairs) > 1]
    p = dict(zip(tested, holm([sign_flip_p(found[place]) for place in tested]), strict=True))
    return [
        f"{_points(pairs)}, {p[place]:.2f}" if place in p else ""
        for place, pairs in enumerate(found)
    ]


def drop_lines(rows: Sequence[Row], study: Evaluation, question: str) -> list[str]:
    """Return the table of drops in points, and how far each arm's exceed LoRA's.

    Empty if all sets of the question are `test`.
    """
    arms, lines = _arms(rows, study, question), []
    for task in study.questions[question]:
        for name in [name for name in _sets(rows, task) if name != TEST]:
            by_arm = {arm: drops(rows, task, arm, name) for arm in arms}
            cells = [f"{task}: {name}"]
            for arm, found in by_arm.items():
                pairs = differences(found, by_arm[UNIFORM]) if arm != UNIFORM else []
                more = f"; {_points(pairs)}" if len(pairs) > 1 else ""
                cells.append(f"{100 * np.mean([*found.values()]):.1f}{more}" if found else "")
            lines.append(cells)
    head = ["drop of task: set", *(f"{arm}; - LoRA (95 %)" for arm in arms)]
    head[1] = UNIFORM
    return _table(head, lines) if lines else []


def rank_lines(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Return a line per task: how far the ranks of `dynamic` agree between seeds and tasks.

    Agreement is Spearman's correlation over layers of the final ranks of two runs, mean over pairs
    of runs with unequal ranks. A turn is a rank change that goes back on the layer's change before.
    """
    finals = {task: select(rows, kind="final", task=task, arm=DYNAMIC) for task in tasks}
    finals = {task: runs for task, runs in finals.items() if runs}
    ranks = {
        task: [found for run in runs if len({*(found := [*run["ranks"].values()])}) > 1]
        for task, runs in finals.items()
    }
    lines = []
    for task, runs in finals.items():
        others = [found for other in finals if other != task for found in ranks[other]]
        counted = [run["turns"] for run in runs if run["turns"] is not None]
        turned, changed = np.sum([(0, 0), *counted], axis=0)
        lines.append(
            [
                task,
                f"{sum(run['moved'] for run in runs)} of {len(runs)}",
                _agreement(combinations(ranks[task], 2)),
                _agreement(product(ranks[task], others)),
                f"{turned} of {changed}" if counted else "",
            ]
        )
    head = ["task", "moved", "agreement between seeds", "with other tasks", "turns of changes"]
    return _table(head, lines)


def _agreement(pairs: Iterable[tuple[list[int], list[int]]]) -> str:
    found = [spearmanr(one, other).statistic for one, other in pairs]
    return f"{np.mean(found):.2f}" if found else ""


def run_lines(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Return a line per task and arm: runs, those that moved or collapsed, rate and parameters.

    A rate at the edge of its trials is marked.
    """
    head = ["task", "arm", "runs", "moved", "collapsed", "rate", "accuracy ±", "loss", "parameters"]
    lines = []
    for task in tasks:
        for arm in dict.fromkeys(row["arm"] for row in select(rows, kind="final", task=task)):
            runs = select(rows, kind="final", task=task, arm=arm)
            exact, rate = [row["exact"] for row in runs], runs[0]["learning_rate"]
            tried = [row["learning_rate"] for row in select(rows, kind="trial", task=task, arm=arm)]
            edge = " edge" if tried and rate in (min(tried), max(tried)) else ""
            lines.append(
                [
                    task,
                    arm,
                    f"{len(runs)}",
                    f"{sum(row['moved'] for row in runs)}",
                    f"{sum(row['judged'][TEST][ANSWERS] == 1 for row in runs)}",
                    f"{rate:.2g}{edge}",
                    f"{np.mean(exact):.3f} ±{np.std(exact):.3f}",
                    f"{np.mean([row['loss'] for row in runs]):.3f}",
                    f"{np.median([row['parameters'] for row in runs]):,.0f}",
                ]
            )
    return _table(head, lines)


def _sets(rows: Sequence[Row], task: str) -> list[str]:
    runs = select(rows, kind="final", task=task, arm=UNIFORM)
    return list(runs[0]["judged"]) if runs else []


def _arms(rows: Sequence[Row], study: Evaluation, question: str) -> list[str]:
    planned = dict.fromkeys(arm for _, arm in study.cells([question]))
    tasks = study.questions[question]
    ended = {(row["task"], row["arm"]) for row in select(rows, kind="final")}
    return [arm for arm in planned if any((task, arm) in ended for task in tasks)]


def _mean(found: Accuracies) -> str:
    return f"{np.mean([*found.values()]):.3f}" if found else ""


def _points(pairs: Sequence[float]) -> str:
    """Return the mean of differences and its interval, in points."""
    low, high = bootstrap_interval(pairs)
    return f"{100 * float(np.mean(pairs)):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def main() -> None:
    """Print all tables of a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--study", type=Path, default=STUDY)
    options = parser.parse_args()
    study = Evaluation(**tomllib.loads(options.study.read_text()))
    rows = read_rows(options.record)
    for question, tasks in study.questions.items():
        if not any(select(rows, kind="final", task=task) for task in tasks):
            continue
        parts = question_lines, drop_lines
        tables = [part(rows, study, question) for part in parts]
        tables += [rank_lines(rows, tasks), run_lines(rows, tasks)]
        shown = "\n\n".join("\n".join(table) for table in tables if table)
        print(f"\n## {question}\n\n{shown}")


if __name__ == "__main__":
    main()
