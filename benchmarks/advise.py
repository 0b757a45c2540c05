"""Check `dynlora advise` against full runs: one appended row per task; a killed process continues.

    python -m benchmarks.advise --data DATA --models MODELS --minutes 110

The full runs are LoRA's final runs in the records of studies, tuned at `r` and at `4 r`. The advice
is for the job of `r` with its tuned settings, and its seeds differ from those of the full runs. Run
it on an otherwise idle machine, because its two minutes are those of a clock. `--show` prints a
table of the rows.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console

from benchmarks.harness.records import RecordFiles
from benchmarks.harness.runner import place
from benchmarks.harness.runs import Choice, Combination, resolve_jobs
from benchmarks.harness.study import read_study
from benchmarks.resumable.appended import AppendedTable, Row, current_commit
from benchmarks.resumable.time_limit import TimeLimit, finish_all
from dynlora.train.advise import ENOUGH, FACTOR, advise_rank, verdict_of
from dynlora.train.config import JobConfig

STUDIES = Path("benchmarks/studies")
SEED = 1000
"""First training seed of the advice."""
COLUMNS = (
    "study", "task", "r", "gain", "low", "high", "learned",
    "full_gain", "full_error", "full_seeds",
    "seeds", "batch", "steps", "job_steps", "rows", "job_rows", "gains", "seconds", "commit",
)  # fmt: skip
KEPT = ("gain", "learned", "gains", "seeds", "seconds")
"""Columns with values of the advice under the same names."""


@dataclass(frozen=True, slots=True)
class Case:
    """One rank of one task of a study."""

    study: str
    task: str
    r: int = 2


CASES = (
    Case("glue", "sst2"),
    Case("recovery", "questions", 4),
    Case("mixture", "mixture"),
    Case("other_domains", "chemprot"),
    Case("sst2_full", "sst2"),
    Case("recovery_wider", "questions"),
    Case("medical_wider", "medical"),
    Case("recovery_wider", "reviews"),
    Case("glue_lower_rates", "qnli", 1),
    Case("other_domains", "books_to_kitchen"),
    Case("glue_lower_rates", "qnli"),
    Case("glue_lower_rates", "cola"),
    Case("glue_lower_rates", "mrpc"),
    Case("glue_lower_rates", "stsb"),
)
"""The last five determined the expected deviations in `dynlora.train.advise`."""


@cache
def read_records(study: str) -> list[Row]:
    """Return the final runs of LoRA in a study."""
    read = read_study(STUDIES / f"{study}.yaml")
    found = RecordFiles(read.results, read.name).read()
    return [run for run in found if (run["kind"], run["method"]) == ("final", "lora")]


def full_runs(case: Case) -> Row:
    """Return the gain of tuned LoRA at `4 r` over `r`, with its standard error.

    Seeds that ran at only one of the ranks do not count.
    """
    by_rank = [
        {
            run["seed"]: run["validation"]["loss"]
            for run in read_records(case.study)
            if (run["task"], run["budget"]) == (case.task, r)
        }
        for r in (case.r, FACTOR * case.r)
    ]
    seeds = sorted(by_rank[0].keys() & by_rank[1].keys())
    lower, higher = ([losses[seed] for seed in seeds] for losses in by_rank)
    gains = [1 - above / below for below, above in zip(lower, higher, strict=True)]
    error = stdev(gains) / len(gains) ** 0.5
    return {
        "full_gain": 1 - fmean(higher) / fmean(lower),
        "full_error": error,
        "full_seeds": len(seeds),
    }


def job_of(case: Case, places: dict[str, Path]) -> JobConfig:
    """Return the job at `r` with the settings that the study chose for LoRA there."""
    run = next(
        run
        for run in read_records(case.study)
        if (run["task"], run["budget"]) == (case.task, case.r)
    )
    combination = Combination(run["model"], case.task, "lora", case.r)
    jobs = resolve_jobs(read_study(STUDIES / f"{case.study}.yaml"))
    return place(jobs.final(combination, SEED, Choice(**run["tuned"])), places)


def check_case(case: Case, table: AppendedTable, places: dict[str, Path]) -> None:
    """Append the advice for a case, unless the table has it."""
    key = dict(zip(("study", "task", "r"), astuple(case), strict=True))
    if table.find(**key) is not None:
        return
    print(key, flush=True)
    found = advise_rank(job_of(case, places), Console())
    low, high = found["interval"] or (None, None)
    table.append(
        key
        | full_runs(case)
        | {name: found[name] for name in KEPT}
        | {"low": low, "high": high, "batch": found["batch"]["trained"]}
        | {"steps": found["steps"]["trained"], "job_steps": found["steps"]["job"]}
        | {"rows": found["rows"]["trained"], "job_rows": found["rows"]["job"]}
        | {"commit": current_commit()}
    )


def table_of(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, with the number of right answers."""
    lines = [
        "| task | r | full runs, gain of 4 r | advice: gain (95 % interval) | answer | seconds |",
        "|---|---|---|---|---|---|",
    ]
    answers, sides = Counter[str](), 0
    for row in rows:
        gain, low, high = (row[name] for name in ("gain", "low", "high"))
        binds = row["full_gain"] >= ENOUGH
        verdict = "undecided" if gain is None else verdict_of(low, high, row["learned"])
        answer = "right" if (verdict == "too low") == binds else "wrong"
        if verdict == "undecided":
            answer = verdict
        answers[answer] += 1
        sides += gain is not None and (gain >= ENOUGH) == binds
        full = f"{_percent(row['full_gain'])} ± {_percent(row['full_error'])} %"
        lines.append(
            f"| {row['task']} ({row['study']}) | {row['r']} | {full} | {_percent(gain)} "
            f"({_percent(low)} to {_percent(high)}) | {verdict} ({answer}) | {row['seconds']:.0f} |"
        )
    counts = ", ".join(f"{answers[answer]} {answer}" for answer in ("right", "wrong", "undecided"))
    return "\n".join([*lines, "", f"{counts}; estimate on the right side: {sides}."])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def main() -> int:
    """Check the missing cases until the time is up, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the studies' data")
    parser.add_argument("--models", type=Path, help="folder of the studies' models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--show", action="store_true", help="print the table")
    options = parser.parse_args()
    table = AppendedTable(options.out / "advise.csv", COLUMNS)
    if options.show:
        print(table_of(table.rows))
        return 0
    limit = TimeLimit(options.minutes)
    places = {"data": options.data, "models": options.models}

    def finish(case: Case) -> None:
        limit.check()
        check_case(case, table, places)

    return finish_all(finish, zip(CASES))


if __name__ == "__main__":
    sys.exit(main())
