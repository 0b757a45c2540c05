"""`dynlora train CONFIG`: read the configuration, run the job, print the table at the end."""

import os
from collections.abc import Sequence

from dynlora.cli.job_parser import parse_job
from dynlora.cli.output import Output

KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")
"""On a CPU torch generates kernels per shape and keeps 1,024 of them. Layers of different ranks
times batches of different lengths are more, and generating them again slows every step."""


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: What follows `train` on the command line.
        output: Where its words go.

    Raises:
        DynamicLoraError: If the input must be mended.
    """
    config = parse_job(arguments)
    if config is None:
        return

    os.environ.setdefault(*KERNELS)  # read when torch is loaded
    # Only now: these load torch, and `--help` shall not wait for it.
    from dynlora.cli.messages import readable_messages
    from dynlora.report.summary import summary_table
    from dynlora.train.job import run_job

    with readable_messages(output.progress):
        report = run_job(config, output.progress)
    output.show(summary_table(report), report.to_dict())
