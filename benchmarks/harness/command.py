"""`python -m benchmarks STUDY`: execute and record the missing runs of a study.

Errors become exit codes as in `dynlora`.
"""

import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import Parser, at_least_one, parse
from benchmarks.harness.assignment import RUNS_PER_PROCESS, Executor
from benchmarks.harness.records import Records, open_records
from benchmarks.harness.runner import Runner, Selection, select
from benchmarks.harness.runs import Jobs, resolve_jobs
from benchmarks.harness.study import Study, StudyError, read_study
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
        from benchmarks.harness.report.command import run as report

        report(arguments[1:], output)
    else:
        run(arguments, output)


def run(arguments: Sequence[str], output: Output) -> None:
    """Run a study.

    Args:
        arguments: Words after `python -m benchmarks` on the command line.
        output: Shows progress and the result.

    Raises:
        DynamicLoraError: If the user must correct the input, or runs did not complete.
        KeyboardInterrupt: If the user stopped it; the message explains how to resume.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return
    jobs = resolve_jobs(read_study(given.study))
    places = _places(given, jobs)
    records = open_records(jobs.study)
    selection = select(jobs, given.only)
    if given.dry_run:
        from benchmarks.harness.progress import show_outlook

        show_outlook(output, jobs, records, selection)
    else:
        _run(given, output, jobs, records, selection, places)


def _run(
    given: Any,
    output: Output,
    jobs: Jobs,
    records: Records,
    selection: Selection,
    places: Mapping[str, Path],
) -> None:
    from benchmarks.harness.progress import Progress, trials_of
    from dynlora.cli.train import KERNELS

    study = jobs.study
    total = trials_of(study, selection.combinations) + len(selection.finals)
    progress = Progress(output, study.name, total)
    tuner = _tuner(jobs)
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
        problems = runner.run(selection, tuner)
    except KeyboardInterrupt as stop:
        command = shlex.join([*PROGRAM.split(), *_words(given)])
        told = f"after {progress.done} of {total} runs; continue with: {command}"
        raise Stopped(told, getattr(stop, "signum", signal.SIGINT)) from None
    finally:
        executor.close()
        records.merge()
    progress.show(study, problems)
    _check_complete(study, progress.unfinished, problems)


def _check_complete(study: Study, unfinished: int, problems: Sequence[str]) -> None:
    reasons = list(problems)
    if unfinished:
        reasons.append(f"{unfinished} final runs did not complete")
    if reasons:
        raise StudyError(
            f"every run of {study.file} must complete, but got: {'; '.join(reasons)}. The column "
            f"`error` of {study.results / study.name}.csv contains the reason. Run the study "
            "again to do what is missing."
        )


def _tuner(jobs: Jobs) -> Any:
    """Return the tuner; None for a study without tuning."""
    if jobs.study.tune is None:
        return None
    try:
        from benchmarks.harness.tuning import open_tuner
    except ModuleNotFoundError as error:
        raise ConfigError(
            "`tune` needs Optuna, which is not installed. Run `pip install optuna`, or remove "
            "`tune`."
        ) from error
    return open_tuner(jobs, jobs.study.tune)


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
    values = {"data": given.data, "models": given.models}
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


def _words(given: Any) -> list[str]:
    """Return the arguments that repeat the command."""
    options = {
        "--data": given.data,
        "--models": given.models,
        "--workers": given.workers,
        "--ray": given.ray,
        "--keep-runs": given.keep_runs,
    }
    words = [str(given.study), *(["--fresh"] if given.fresh else [])]
    words += [word for glob in given.only for word in ("--only", glob)]
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    return words


def make_parser() -> Parser:
    """Return the command's parser."""
    parser = Parser(PROGRAM, "Run a study: methods, tasks, models, budgets and seeds.")
    parser.epilog = f"`{PROGRAM} report` writes tables and figures from the records."
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
        action="append",
        default=[],
        help="do the final runs of these names: model/task/method/rBUDGET/sSEED; may be repeated",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=at_least_one,
        help="runs at once (default: 1; with --ray what the cluster has room for)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="do the runs on a Ray cluster: auto or HOST:PORT joins one, local starts one here",
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
