"""`dynlora bench STUDY`: do the runs of a study that are missing, and record each.

`dynlora bench report` is read by `dynlora.cli.bench_report`.
"""

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.output import Output
from dynlora.cli.run_argument import at_least_one
from dynlora.errors import ConfigError, StudyError

REPORT = "report"
PLACES = ("data", "models")
"""Placeholders that a study may have for folders of this machine, each an option."""


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: What follows `bench` on the command line.
        output: Where its words go.

    Raises:
        DynamicLoraError: If the input must be mended, or runs did not complete.
        KeyboardInterrupt: If the user stopped it; its text says how to go on.
    """
    if arguments and arguments[0] == REPORT:
        from dynlora.cli import bench_report

        bench_report.run(arguments[1:], output)
        return
    given = parse(make_parser(), arguments)
    if given is None:
        return

    # Only now: `--help` shall not wait for these.
    from dynlora.bench.records import open_records
    from dynlora.bench.runner import select
    from dynlora.bench.runs import resolve_jobs
    from dynlora.bench.study import read_study
    from dynlora.cli.job_parser import check_keys, parse_values

    study = read_study(given.study, check_keys)
    jobs = resolve_jobs(study, parse_values)
    places = _places(given, jobs)
    records = open_records(study)
    selection = select(jobs, given.only)
    if given.dry_run:
        _show_outlook(output, jobs, records, selection)
        return
    _run(given, output, jobs, records, selection, places)


@dataclass(slots=True)
class Progress:
    """Says what has become of each run, a line each, and adds it up."""

    output: Output
    study: str
    total: int
    """Runs, trials included."""
    done: int = 0
    runs: list[tuple[Any, Mapping[str, Any], bool]] = field(default_factory=list)

    def watch(self, run: Any, record: Mapping[str, Any], was_there: bool) -> None:
        """Take note of a run; one that was there before has no line."""
        from rich.text import Text

        self.done += 1
        self.runs.append((run, record, was_there))
        if was_there:
            return
        found = record["error"] or record["status"]
        if record["status"] == "completed":
            found = f"{_metrics(record)}, {record['seconds']['whole']:.0f} s"
        line = f"{self.study} {self.done} of {self.total}: {run.name}: {found}"
        self.output.progress.print(Text(line), soft_wrap=True)

    @property
    def unfinished(self) -> int:
        """Final runs that were tried and did not complete."""
        return sum(
            run.kind == "final" and record["status"] != "completed" for run, record, _ in self.runs
        )


def _run(
    given: Any, output: Output, jobs: Any, records: Any, selection: Any, places: dict[str, Path]
) -> None:
    from dynlora.bench.runner import Runner
    from dynlora.cli.train import KERNELS

    study = jobs.study
    trials = 0 if study.tuning is None else study.tuning.trials * len(selection.cells)
    progress = Progress(output, study.name, trials + len(selection.finals))
    os.environ.setdefault(*KERNELS)  # workers read it when they load torch
    executor, threads = _executor(given)
    runner = Runner(
        jobs=jobs,
        records=records,
        executor=executor,
        threads=threads,
        places=places,
        keep=given.keep_runs,
        watch=progress.watch,
    )
    try:
        problems = runner.run(selection, _tuner(jobs))
    except KeyboardInterrupt:
        command = shlex.join(["dynlora", "bench", *_words(given)])
        told = f"after {progress.done} of {progress.total} runs; go on: {command}"
        raise KeyboardInterrupt(told) from None
    finally:
        executor.close()
    output.show(_table(study, progress), _values(study, progress, problems))
    _check_complete(progress, problems, study)


def _check_complete(progress: Progress, problems: Sequence[str], study: Any) -> None:
    reasons = [*problems]
    if progress.unfinished:
        reasons.append(f"{progress.unfinished} final runs did not complete")
    if reasons:
        raise StudyError(
            f"every run of {study.file} must complete, got: {'; '.join(reasons)}. `error` in the "
            f"records in {study.results} says why; mend it and run the study again, which does "
            "what is missing."
        )


def _tuner(jobs: Any) -> Any:
    if jobs.study.tuning is None:
        return None
    try:
        from dynlora.bench.tuning import open_tuner
    except ModuleNotFoundError as error:
        raise ConfigError(
            "`tune` needs Optuna, which is not installed: pip install 'dynlora[bench]', or leave "
            "`tune` out."
        ) from error
    return open_tuner(jobs, jobs.study.tuning)


def _executor(given: Any) -> tuple[Any, int]:
    from dynlora.bench.worker import RUNS_PER_PROCESS, LocalExecutor

    runs = 1 if given.fresh else RUNS_PER_PROCESS
    return LocalExecutor(given.workers, runs=runs), given.workers


def _places(given: Any, jobs: Any) -> dict[str, Path]:
    """Return the folders that were given for placeholders.

    Raises:
        ConfigError: If the study has a placeholder for which there is none.
    """
    values = {name: getattr(given, name) for name in PLACES}
    places = {name: path.absolute() for name, path in values.items() if path is not None}
    for config in jobs.configs.values():
        for text in (config.model.path, config.data.path, config.lora.start_from):
            for name in PLACES:
                if text is not None and f"{{{name}}}" in text and name not in places:
                    raise ConfigError(
                        f"`--{name} DIR` must be given, for {jobs.study.file} names {text}: say "
                        f"which folder {{{name}}} stands for."
                    )
    return places


def _words(given: Any) -> list[str]:
    """Return the command's arguments, as they were understood."""
    words = [str(given.study)]
    for name in (*PLACES, "only", "keep_runs"):
        value = getattr(given, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words + (["--workers", str(given.workers)] if given.workers > 1 else [])


def _show_outlook(output: Output, jobs: Any, records: Any, selection: Any) -> None:
    """Show every final run and whether it is there; those of cells to be tuned are not known."""
    from rich.table import Table
    from rich.text import Text

    study = jobs.study
    states: list[tuple[str, str]] = []
    for cell, seed in selection.finals:
        state = "after tuning"
        if study.tuning is None:
            state = records.status(jobs.final(cell, seed, None)) or "to do"
        states.append((f"{cell.name}/s{seed}", state))
    table = Table(title=f"dynlora bench: {study.name} (--dry-run)", show_header=False)
    for name, state in states:
        table.add_row(Text(name), Text(state))
    trials = 0 if study.tuning is None else study.tuning.trials * len(selection.cells)
    runs = [{"name": name, "state": state} for name, state in states]
    output.show(
        table,
        {
            "dry_run": True,
            "study": study.name,
            "results": str(study.results),
            "trials": trials,
            "runs": runs,
        },
    )


def _metrics(record: Mapping[str, Any]) -> str:
    """Return a completed run's loss and main metric, on validation and, if it was, on test."""
    main = record["main_metric"]
    parts = []
    for split in ("validation", "test"):
        found = record[split]
        if found is not None:
            shown = [f"{name} {_number(found[name])}" for name in dict.fromkeys((main, "loss"))]
            parts.append(f"{split} {', '.join(shown)}")
    return "; ".join(parts)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _table(study: Any, progress: Progress) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"dynlora bench: {study.name}", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for kind in ("trial", "final"):
        mine = [entry for entry in progress.runs if entry[0].kind == kind]
        if mine:
            counts = Counter(record["status"] for _, record, _ in mine)
            text = ", ".join(f"{count} {status}" for status, count in counts.items())
            there = sum(was_there for _, _, was_there in mine)
            table.add_row(f"{kind} runs", Text(f"{text}; {there} were there before"))
    table.add_row("records", Text(str(study.results)))
    return table


def _values(study: Any, progress: Progress, problems: Sequence[str]) -> dict[str, Any]:
    return {
        "study": study.name,
        "results": str(study.results),
        "problems": list(problems),
        "runs": [
            {
                "name": run.name,
                "kind": run.kind,
                "key": run.key,
                "status": record["status"],
                "error": record["error"],
                "was_there": was_there,
                "main_metric": record["main_metric"],
                "validation": record["validation"],
                "test": record["test"],
                "tuned": record["tuned"],
            }
            for run, record, was_there in progress.runs
        ],
    }


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = verb_parser("bench")
    parser.epilog = "`dynlora bench report` makes tables and figures of what was recorded."
    parser.add_argument("study", metavar="STUDY", type=Path, help="YAML file of the study")
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="folder that {data} in the study stands for"
    )
    parser.add_argument(
        "--models", metavar="DIR", type=Path, help="folder that {models} in the study stands for"
    )
    parser.add_argument(
        "--only",
        metavar="GLOB",
        help="final runs to do, by their names: model/task/method/rBUDGET/sSEED",
    )
    parser.add_argument(
        "--workers", metavar="N", type=at_least_one, default=1, help="runs at once (default: 1)"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="start a process for each run: slower, but its peak of memory is its own alone",
    )
    parser.add_argument(
        "--keep-runs", metavar="DIR", type=Path, help="keep the runs' folders in this one"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be run and what is there"
    )
    return parser
