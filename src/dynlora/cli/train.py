"""`dynlora train CONFIG`: train a job, or with `--dry-run` check it, and print its results."""

import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from dynlora.cli.arguments import COUNT, flag, option
from dynlora.cli.job_options import JobVerb, given_keys
from dynlora.cli.output import Output, readable_messages
from dynlora.errors import ConfigError
from dynlora.runs.checkpoints import way_on
from dynlora.train.config import JobConfig
from dynlora.train.processes import explaining_loss, in_group, launch, sharding_engine
from dynlora.train.signals import ReportedError


def _run(config: JobConfig, given: Any, output: Output) -> None:
    if in_group() and given.processes is not None:
        raise ConfigError(
            f"`--processes` must be left out under torchrun, got {given.processes}: torchrun "
            "starts the processes."
        )
    count = int(os.environ["WORLD_SIZE"]) if in_group() else given.processes or 1
    advice = partial(way_on, Path(config.output), config.method, count, sharding_engine())
    if given.processes is None:
        with readable_messages(output.progress), explaining_loss(advice):
            _train(config, given, output)
    elif code := launch(_command(given, output), count, advice):
        raise ReportedError(code)


def _train(config: JobConfig, given: Any, output: Output) -> None:
    from dynlora.report.results import dry_run_text, result_table
    from dynlora.train.job import check_job, run_job

    if given.dry_run:
        outlook, metrics = check_job(config, output.progress)
        values = {"dry_run": True, **outlook, "metrics_before": metrics}
        output.show(Text(dry_run_text(outlook, metrics)), values)
    elif (found := run_job(config, output.progress)) is not None:
        values, events = found
        output.show(result_table(values, events), values)
        following = f"next: dynlora report {shlex.quote(config.output)}"
        output.progress.print(following, soft_wrap=True)


def _command(given: Any, output: Output) -> list[str]:
    """Return the command of each process."""
    flags = {"--dry-run": given.dry_run, "--json": output.as_json, "--quiet": output.quiet}
    return [
        *(sys.executable, "-P", "-m", "dynlora", "train", str(given.config)),
        *(f"--{key}={text}" for key, text in given_keys(given).items()),
        *(flag for flag, on in flags.items() if on),
    ]


COMMAND = JobVerb(
    "train",
    "train and evaluate as CONFIG (a YAML file) specifies",
    _run,
    [
        flag("--dry-run", "Load and check everything, and write nothing."),
        option(
            "--processes N",
            "Train in so many processes of this machine, each with its own GPU if it has any.",
            COUNT,
        ),
    ],
)
