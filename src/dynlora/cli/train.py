"""`dynlora train CONFIG`: train a job, or with `--dry-run` check it, and print its results."""

import os
from typing import Any

import click
from rich.text import Text

from dynlora.cli.job_options import JobVerb, job_of
from dynlora.cli.output import Output, readable_messages

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
"""On a CPU torch generates kernels per shape and keeps 1,024. Combinations of rank and batch length
exceed this number, and generating kernels again slows every step."""


def _run(given: Any, output: Output) -> None:
    config = job_of(given, output)
    if config is None:
        return

    os.environ.setdefault(*KERNELS)  # read when torch is loaded
    from dynlora.report.results import result_table
    from dynlora.train.job import check_job, run_job

    with readable_messages(output.progress):
        if given.dry_run:
            outlook, metrics = check_job(config, output.progress)
            values = {"dry_run": True, **outlook.to_dict(), "metrics_before": metrics}
            output.show(Text(outlook.text(metrics)), values)
        else:
            report = run_job(config, output.progress)
            output.show(result_table(report), report.to_dict())


COMMAND = JobVerb(
    "train",
    "train and evaluate as CONFIG (a YAML file) specifies",
    _run,
    [
        click.Option(
            ["--dry-run"], is_flag=True, help="Load and check everything, and write nothing."
        )
    ],
)
