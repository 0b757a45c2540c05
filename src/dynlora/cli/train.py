"""`dynlora train CONFIG`: train a job, or with `--dry-run` check it, and print its results."""

from typing import Any

import click
from rich.text import Text

from dynlora.cli.job_options import JobVerb
from dynlora.cli.output import Output, readable_messages
from dynlora.train.config import JobConfig


def _run(config: JobConfig, given: Any, output: Output) -> None:
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
