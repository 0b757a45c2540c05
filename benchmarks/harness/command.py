"""`python -m benchmarks STUDY`: execute and record the missing runs of a study.

Errors become exit codes as in `dynlora`.
"""

import os
import shlex
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.harness.assignment import RUNS_PER_PROCESS, Executor
from benchmarks.harness.records import open_records
from benchmarks.harness.runner import Runner, Tune, select
from benchmarks.harness.runs import Jobs, resolve_jobs
from benchmarks.harness.study import StudyError, read_study
from dynlora.cli.arguments import COUNT, FILE, FOLDER, Verb, call
from dynlora.cli.job_options import KERNELS
from dynlora.cli.main import run_command
from dynlora.cli.output import Output
from dynlora.errors import ConfigError
from dynlora.train.signals import Stopped

PROGRAM = "python -m benchmarks"
REPORT = "report"
PLACES = ("data", "models")
"""Placeholders for this machine's folders, each with an option."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m benchmarks`.

    Args:
        argv: Arguments without the program name; None uses the process's arguments.

    Returns:
        The exit code, as documented for `dynlora`.
    """
    return run_command(argv, _dispatch)


def _dispatch(arguments: list[str], output: Output) -> None:
    if arguments[:1] == [REPORT]:
        from benchmarks.harness.report.command import COMMAND

        call(COMMAND, arguments[1:], output)
    else:
        summary = f"run a study; `{PROGRAM} {REPORT}` writes tables and figures from the records"
        call(Verb(PROGRAM, summary, partial(_run, arguments), PARAMETERS), arguments, output)


def _run(arguments: Sequence[str], given: Any, output: Output) -> None:
    """Run a study.

    Raises:
        DynamicLoraError: If the user must correct the input, or runs did not complete.
        KeyboardInterrupt: If the user stopped it; the message explains how to resume.
    """
    from benchmarks.harness.progress import Progress, show_outlook, trials_of

    jobs = resolve_jobs(read_study(given.study))
    places = _places(given, jobs)
    records = open_records(jobs.study)
    selection = select(jobs, given.only)
    if given.dry_run:
        show_outlook(output, jobs, records, selection)
        return
    total = trials_of(jobs.study, selection.combinations) + len(selection.finals)
    progress = Progress(output, jobs.study, total)
    tune = _tune_of(jobs)
    os.environ.setdefault(*KERNELS)  # read by workers when they load torch
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
        problems = runner.run(selection, tune)
    except KeyboardInterrupt as stop:
        command = shlex.join([*PROGRAM.split(), *arguments])
        told = f"after {len(progress.runs)} of {total} runs; continue with: {command}"
        raise Stopped(told, getattr(stop, "signum", signal.SIGINT)) from None
    finally:
        executor.close()
        records.merge()
    progress.show(problems)
    if progress.unfinished:
        problems.append(f"{progress.unfinished} final runs did not complete")
    if problems:
        raise StudyError(
            f"every run of {jobs.study.file} must complete, but got: {'; '.join(problems)}. The "
            f"column `error` of {jobs.study.results / jobs.study.name}.csv contains the reason. "
            "Run the study again to do what is missing."
        )


def _tune_of(jobs: Jobs) -> Tune | None:
    """Return the function that tunes; None for a study without tuning."""
    if jobs.study.tune is None:
        return None
    try:
        from benchmarks.harness.tuning import OptunaTuner
    except ModuleNotFoundError as error:
        raise ConfigError(
            "`tune` needs Optuna, which is not installed. Run `pip install optuna`, or remove "
            "`tune`."
        ) from error
    return OptunaTuner(jobs, jobs.study.tune).tune


def _executor(given: Any) -> tuple[Executor, int]:
    """Return the executor and the number of concurrent runs."""
    runs = 1 if given.fresh else RUNS_PER_PROCESS
    if given.ray is not None:
        from benchmarks.harness.over_ray import RayExecutor

        cluster = RayExecutor(given.ray, runs=runs)
        return cluster, given.workers or cluster.places
    from benchmarks.harness.worker import LocalExecutor

    count = given.workers or 1
    return LocalExecutor(count, runs=runs), count


def _places(given: Any, jobs: Jobs) -> dict[str, Path]:
    """Return the folders by placeholder.

    Raises:
        ConfigError: If one is not a folder, or a placeholder of the study has no folder.
    """
    values = {name: getattr(given, name) for name in PLACES}
    places = {name: path.absolute() for name, path in values.items() if path is not None}
    for name, folder in places.items():
        if not folder.is_dir():
            raise ConfigError(f"`--{name}` must be a folder, but got {folder}.")
    for config in jobs.configs.values():
        for text in (config.model.path, config.data.path, config.lora.start_from):
            for name in PLACES:
                if text is not None and f"{{{name}}}" in text and name not in places:
                    raise ConfigError(
                        f"`--{name} DIR` must be given, because {jobs.study.file} names {text}. "
                        f"It is the folder that {{{name}}} stands for."
                    )
    return places


PARAMETERS = (
    click.Argument(["study"], type=FILE, metavar="STUDY", help="YAML file of the study."),
    *(
        click.Option(
            [f"--{place}"], type=FOLDER, metavar="DIR", help=f"Folder for {{{place}}} in the study."
        )
        for place in PLACES
    ),
    click.Option(
        ["--only"], metavar="GLOB", multiple=True,
        help="Final runs to do, as model/task/method/rBUDGET/sSEED; may be repeated.",
    ),
    click.Option(
        ["--workers"], type=COUNT, metavar="N",
        help="Runs at once (default: 1; with --ray as many as the cluster has room for).",
    ),
    click.Option(
        ["--ray"], metavar="ADDRESS",
        help="Run on a Ray cluster: auto or HOST:PORT joins one, local starts one.",
    ),
    click.Option(
        ["--fresh"], is_flag=True,
        help="Start a process per run: slower, but peaks of memory exclude earlier runs.",
    ),
    click.Option(
        ["--keep-runs"], type=FOLDER, metavar="DIR", help="Folder in which run folders are kept."
    ),
    click.Option(["--dry-run"], is_flag=True, help="List the state of all runs; run nothing."),
)  # fmt: skip
