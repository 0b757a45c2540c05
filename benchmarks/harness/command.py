"""`python -m benchmarks STUDY`: execute and record the missing runs of a study."""

import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.assignment import RUNS_PER_PROCESS, Executor
from benchmarks.harness.records import Records, open_records
from benchmarks.harness.runner import Runner, Selection, select
from benchmarks.harness.runs import Jobs, resolve_jobs
from benchmarks.harness.study import Study, read_study
from dynlora.cli.arguments import VerbParser, new_parser, parse
from dynlora.cli.job_parser import check_keys, parse_values
from dynlora.cli.output import Output
from dynlora.cli.run_argument import at_least_one
from dynlora.errors import ConfigError, StudyError
from dynlora.train.signals import Stopped

PROGRAM = "python -m benchmarks"
PLACES = ("data", "models")
"""Placeholders for this machine's folders, each with an option."""


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the command.

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
    jobs = resolve_jobs(read_study(given.study, check_keys), parse_values)
    places = _places(given, jobs)
    records = open_records(jobs.study)
    selection = select(jobs, given.only)
    if given.dry_run:
        from benchmarks.harness.view import show_outlook

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
    from benchmarks.harness.view import Progress, trials_of
    from dynlora.cli.train import KERNELS

    study = jobs.study
    total = trials_of(study, selection.cells) + len(selection.finals)
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
        told = f"after {progress.done} of {total} runs; go on: {command}"
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
            f"every run of {study.file} must complete, got: {'; '.join(reasons)}. The column "
            f"`error` of {study.results / study.name}.csv says why; mend it and run the study "
            "again, which does what is missing."
        )


def _tuner(jobs: Jobs) -> Any:
    """Return the tuner; None for a study without tuning."""
    if jobs.study.tuning is None:
        return None
    try:
        from benchmarks.harness.tuning import open_tuner
    except ModuleNotFoundError as error:
        raise ConfigError(
            "`tune` needs Optuna, which is not installed: pip install optuna, or leave `tune` out."
        ) from error
    return open_tuner(jobs, jobs.study.tuning)


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
            raise ConfigError(f"`--{name}` must be a folder, got {folder}, which is none.")
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


def make_parser() -> VerbParser:
    """Return the command's parser."""
    parser = new_parser(PROGRAM, "run a study: methods, tasks, models, budgets and seeds")
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
