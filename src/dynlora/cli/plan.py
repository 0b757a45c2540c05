"""`dynlora plan CONFIG`: what would be trained, and the memory that it would take, per method."""

import os
from collections.abc import Sequence

from dynlora.cli.job_parser import MEASURE, parse_job
from dynlora.cli.output import Output
from dynlora.cli.train import KERNELS


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: What follows `plan` on the command line.
        output: Where its words go.

    Raises:
        DynamicLoraError: If the input must be mended.
    """
    given = [word for word in arguments if word != MEASURE]
    config = parse_job(given, "plan")
    if config is None:
        return

    os.environ.setdefault(*KERNELS)  # read when torch is loaded
    # Only now: these load torch, and `--help` shall not wait for it.
    from dynlora.cli.measured_run import measure_run
    from dynlora.cli.messages import readable_messages
    from dynlora.report.plan_tables import plan_tables
    from dynlora.train.plan.job_plan import plan_job

    with readable_messages(output.progress):
        plan = plan_job(config, output.progress)
        values = plan.to_dict()
        if MEASURE in arguments:
            output.progress.print(f"training a few steps with {config.method}", highlight=False)
            values["measured"] = measure_run(given, plan.steps)
    output.show(plan_tables(values), values)
