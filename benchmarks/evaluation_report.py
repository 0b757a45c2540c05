"""Tables of the evaluation: accuracy by set of rows and arm, and differences from LoRA.

    python -m benchmarks.evaluation_report benchmarks/results/evaluation.csv

Prints Markdown. The study's file defines metric, intervals and correction.
"""

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.appended import Row, read_rows, select
from benchmarks.evaluation import Evaluation
from benchmarks.harness.report.statistics import bootstrap_interval, holm, sign_flip_p
from benchmarks.screen_arms import AUTO, DYNAMIC, UNIFORM

STUDY = Path("benchmarks/studies/evaluation.toml")
TEST = "test"
EXACT, ANSWERS = 1, 2
"""Places of accuracy and of the number of different answers in a judgement."""


def accuracies(rows: Sequence[Row], task: str, arm: str, name: str) -> dict[int, float]:
    """Return the accuracy on a set of rows by seed."""
    runs = select(rows, kind="final", task=task, arm=arm)
    return {row["seed"]: row["judged"][name][EXACT] for row in runs}


def differences(rows: Sequence[Row], task: str, arm: str, name: str) -> list[float]:
    """Return an arm's accuracy less LoRA's, paired by seed."""
    ours, theirs = (accuracies(rows, task, each, name) for each in (arm, UNIFORM))
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def question_lines(rows: Sequence[Row], study: Evaluation, question: str) -> list[str]:
    """Return the table of a question: sets of rows, arms, and paired differences in points."""
    cells = [
        (task, name)
        for task in study.questions[question]
        if (runs := select(rows, kind="final", task=task, arm=UNIFORM))
        for name in runs[0]["judged"]
    ]
    arms = [arm for arm in study.arms if select(rows, kind="final", arm=arm)]
    compared = [arm for arm in (DYNAMIC, AUTO) if arm in arms]
    shown = {arm: _compared(rows, cells, arm) for arm in compared}
    head = ["task: set", *arms, *(f"{arm} - LoRA, points (95 %), p" for arm in compared)]
    lines = [_line(head), _line(["---"] * len(head))]
    for place, (task, name) in enumerate(cells):
        means = [_mean(accuracies(rows, task, arm, name)) for arm in arms]
        lines.append(_line([f"{task}: {name}", *means, *(shown[arm][place] for arm in compared)]))
    return lines


def _compared(rows: Sequence[Row], cells: Sequence[tuple[str, str]], arm: str) -> list[str]:
    """Return an arm's differences from LoRA with p-values corrected over all cells."""
    found = [differences(rows, task, arm, name) for task, name in cells]
    tested = [place for place, pairs in enumerate(found) if len(pairs) > 1]
    p = dict(zip(tested, holm([sign_flip_p(found[place]) for place in tested]), strict=True))
    shown = []
    for place, pairs in enumerate(found):
        if place not in p:
            shown.append("")
            continue
        low, high = bootstrap_interval(pairs)
        mean = 100 * float(np.mean(pairs))
        shown.append(f"{mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}), {p[place]:.2f}")
    return shown


def run_lines(rows: Sequence[Row], tasks: Sequence[str]) -> list[str]:
    """Return a line per task and arm: runs, those that moved or collapsed, rate and parameters."""
    head = ["task", "arm", "runs", "moved", "collapsed", "rate", "accuracy ±", "loss", "parameters"]
    lines = [_line(head), _line(["---"] * len(head))]
    for task in tasks:
        for arm in dict.fromkeys(row["arm"] for row in select(rows, kind="final", task=task)):
            runs = select(rows, kind="final", task=task, arm=arm)
            exact = [row["exact"] for row in runs]
            cells = [
                f"{task}",
                arm,
                f"{len(runs)}",
                f"{sum(row['moved'] for row in runs)}",
                f"{sum(row['judged'][TEST][ANSWERS] == 1 for row in runs)}",
                f"{runs[0]['learning_rate']:.2g}",
                f"{np.mean(exact):.3f} ±{np.std(exact):.3f}",
                f"{np.mean([row['loss'] for row in runs]):.3f}",
                f"{np.median([row['parameters'] for row in runs]):,.0f}",
            ]
            lines.append(_line(cells))
    return lines


def _mean(found: dict[int, float]) -> str:
    return f"{np.mean([*found.values()]):.3f}" if found else ""


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print all tables of a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--study", type=Path, default=STUDY)
    options = parser.parse_args()
    study = Evaluation(**tomllib.loads(options.study.read_text()))
    rows = read_rows(options.record)
    for question, tasks in study.questions.items():
        print("\n".join([f"\n## {question}\n", *question_lines(rows, study, question)]))
        print("\n".join(["", *run_lines(rows, tasks)]))


if __name__ == "__main__":
    main()
