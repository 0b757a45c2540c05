"""`dynlora completion SHELL`: print click's completion script, which asks `dynlora` at each TAB."""

from typing import Any

import click
from click.shell_completion import get_completion_class

from dynlora.cli.arguments import Verb
from dynlora.cli.output import Output

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_DYNLORA_COMPLETE"  # environment variable with which the script asks for completions


def run(given: Any, output: Output) -> None:
    """Print the script, even with `--quiet`."""
    kind = get_completion_class(given.shell)
    assert kind is not None
    script = kind(COMMAND, {}, "dynlora", VARIABLE).source().rstrip()
    output.write(script, {"shell": given.shell, "script": script})


COMMAND = Verb(
    "completion",
    f"completion script for {', '.join(SHELLS[:-1])} or {SHELLS[-1]}",
    run,
    [click.Argument(["shell"], type=click.Choice(SHELLS), metavar="SHELL")],
)
