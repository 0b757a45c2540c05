"""`dynlora train CONFIG`: train a job and print its results.

With `--dry-run`, load and check everything and print a summary, but do not train.
"""

import os
from collections.abc import Sequence

from dynlora.cli.job_parser import DRY_RUN, parse_job
from dynlora.cli.output import Output

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
"""On a CPU torch generates kernels per shape and keeps 1,024. Combinations of rank and batch length
exceed this number, and generating kernels again slows every step."""


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `train` on the command line.
        output: Shows progress and the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    config = parse_job([word for word in arguments if word != DRY_RUN])
    if config is None:
        return

    os.environ.setdefault(*KERNELS)  # read when torch is loaded
    # Only now: these load torch, and `--help` need not wait for it.
    from rich.text import Text

    from dynlora.cli.messages import readable_messages
    from dynlora.report.summary import summary_table
    from dynlora.train.job import check_job, run_job

    with readable_messages(output.progress):
        if DRY_RUN in arguments:
            outlook, metrics = check_job(config, output.progress)
            values = {"dry_run": True, **outlook.to_dict(), "metrics_before": metrics}
            output.show(Text(outlook.text(metrics)), values)
        else:
            report = run_job(config, output.progress)
            output.show(summary_table(report), report.to_dict())
