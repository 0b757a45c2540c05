"""`dynlora advise CONFIG`: whether `lora.r` is enough, from short runs at `4 r`."""

from collections.abc import Mapping
from typing import Any

import click
from rich.console import Group
from rich.text import Text

from dynlora.cli.arguments import option
from dynlora.cli.job_options import JobVerb
from dynlora.cli.output import Output, readable_messages
from dynlora.train.config import JobConfig

OPENINGS = {
    "enough": "r = {r} is enough",
    "too low": "r = {r} is not enough",
    "undecided": "It is not clear whether r = {r} is enough",
}


def _run(config: JobConfig, given: Any, output: Output) -> None:
    from dynlora.train.advise import advise_rank

    with readable_messages(output.progress):
        seconds = None if given.minutes is None else 60 * given.minutes
        values = advise_rank(config, output.progress, seconds=seconds)
    output.show(Group(Text(answer(values)), Text(_basis(values))), values)


def answer(values: Mapping[str, Any]) -> str:
    """Return the advice in one sentence."""
    opening = OPENINGS[values["verdict"]].format(**values)
    if values["gain"] is None:
        return f"{opening}: the time was too short; raise `--minutes`."
    if values["learned"] <= values["threshold"]:
        return f"{opening}: runs of this size learn too little; raise `--minutes`."
    low, high = values["interval"]
    return (
        f"{opening}: r = {values['higher_r']} would lower the validation loss by "
        f"{100 * values['gain']:.1f} % (95 % interval {100 * low:.1f} to {100 * high:.1f})."
    )


def _basis(values: Mapping[str, Any]) -> str:
    steps, rows, seeds = values["steps"], values["rows"], values["seeds"]
    return (
        f"Measured in {values['seconds']:.0f} s with {seeds} seed{'' if seeds == 1 else 's'} on "
        f"{rows['trained']:,} of {rows['job']:,} rows in {steps['trained']:,} of {steps['job']:,} "
        f"steps. A gain of {100 * values['threshold']:g} % counts."
    )


COMMAND = JobVerb(
    "advise",
    "whether lora.r is enough, from short runs at 4 r",
    _run,
    [
        option(
            "--minutes N",
            "Time limit in minutes (default: 5 % of the job's time, but at least 2).",
            click.FloatRange(min=0, min_open=True),
        )
    ],
)
