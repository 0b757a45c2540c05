"""`dynlora plan CONFIG`: print the parameters, and with `--measure` the peak memory, per method."""

import os
from collections.abc import Sequence

from dynlora.cli.job_parser import MEASURE, parse_job
from dynlora.cli.output import Output
from dynlora.cli.train import KERNELS


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `plan` on the command line.
        output: Shows progress and the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    config = parse_job([word for word in arguments if word != MEASURE], "plan")
    if config is None:
        return

    os.environ.setdefault(*KERNELS)  # read when torch is loaded, by the child processes too
    # Only now: these load torch, and `--help` need not wait for it.
    from dynlora.cli.messages import readable_messages
    from dynlora.report.plan_table import plan_table
    from dynlora.train.plan import measure_methods, plan_job

    with readable_messages(output.progress):
        values = plan_job(config, output.progress)
        if MEASURE in arguments:
            values |= measure_methods(config, values["methods"], output.progress)
    output.show(plan_table(values), values)
