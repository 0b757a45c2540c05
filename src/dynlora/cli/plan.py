"""`dynlora plan CONFIG`: print the parameters, and with `--measure` the peak memory, per method."""

from typing import Any

from dynlora.cli.arguments import flag
from dynlora.cli.job_options import JobVerb
from dynlora.cli.output import Output, readable_messages
from dynlora.train.config import JobConfig


def _run(config: JobConfig, given: Any, output: Output) -> None:
    from dynlora.report.results import plan_table
    from dynlora.train.plan import measure_methods, plan_job

    with readable_messages(output.progress):
        values = plan_job(config, output.progress)
        if given.measure:
            values |= measure_methods(config, values["methods"], output.progress)
    output.show(plan_table(values), values)


COMMAND = JobVerb(
    "plan",
    "parameters per method before a run; peak memory with --measure",
    _run,
    [flag("--measure", "Also train each method for two steps and measure its peak memory.")],
)
