"""Commands and arguments of the command line, built on click."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
from click.shell_completion import CompletionItem

from dynlora.cli.output import Output
from dynlora.errors import ConfigError

WIDTH = {"max_content_width": 100}
"""Columns of help at most."""
Run = Callable[[Any, Output], None]
"""Runs a command with its parsed arguments, as attributes."""


class Verb(click.Command):
    """A command that runs with its arguments and the `Output` of the call."""

    def __init__(self, name: str, summary: str, run: Run, parameters: Sequence[click.Parameter]):
        """Create the command.

        Args:
            name: Last word of the command, such as `train`.
            summary: Purpose in a few words, for help.
            run: Runs it.
            parameters: Its own arguments and options.
        """
        super().__init__(
            name,
            help=f"{summary[0].upper()}{summary[1:]}.",
            short_help=summary,
            params=[*parameters, *common_options()],
            callback=click.pass_obj(lambda out, /, **given: run(SimpleNamespace(**given), out)),
            add_help_option=False,
            context_settings=WIDTH,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words as click does, but never take an option for another option's value."""
        options = [param for param in self.params if isinstance(param, click.Option)]
        valued = {name for option in options if not option.is_flag for name in option.opts}
        for word, following in pairwise(args):
            if word in valued and following.startswith("--") and not ctx.resilient_parsing:
                raise click.BadOptionUsage(word, f"Option '{word}' requires an argument.", ctx)
        return super().parse_args(ctx, args)


class PathType(click.ParamType[Path]):
    """A path; empty ones are refused, because they would mean the current folder."""

    name = "path"

    def __init__(self, kind: str) -> None:
        """Create the type.

        Args:
            kind: `file` or `dir`, for shell completion.
        """
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        if "\0" in str(value):
            self.fail(f"it must be a path without NUL, but got {value!r}.", param, ctx)
        if not str(value).strip():
            self.fail(f"it must be a path, but got {value!r}. Is a variable unset?", param, ctx)
        return Path(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Let the shell complete the path."""
        return [CompletionItem(incomplete, type=self.kind)]


FILE, FOLDER = PathType("file"), PathType("dir")
COUNT = click.IntRange(min=1)


def common_options() -> list[click.Parameter]:
    """Return the options of every command."""

    def show_help(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            ctx.obj.line(ctx.get_help())
            ctx.exit()

    # `run_command` reads both switches, which may stand anywhere.
    texts = {
        "--json": "Print the result as one JSON object on standard output.",
        "--quiet": "Print only errors, and the result with --json.",
    }
    switches = [
        click.Option([name], is_flag=True, expose_value=False, help=text)
        for name, text in texts.items()
    ]
    shown = click.Option(
        ["-h", "--help"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show_help,
        help="Show this help.",
    )
    return [*switches, shown]


def call(command: click.Command, words: Sequence[str], output: Output) -> None:
    """Run a command.

    Args:
        command: The command.
        words: The command line without the command's name.
        output: Shows progress, result and help.

    Raises:
        ConfigError: If an argument is missing, unknown or of the wrong type.
        DynamicLoraError: If the command refuses its input.
    """
    try:
        with command.make_context(command.name, list(words), obj=output) as context:
            command.invoke(context)
    except click.exceptions.Exit:
        return
    except click.UsageError as error:
        usage = "" if error.ctx is None else f" {error.ctx.get_usage()}"
        reason = error.format_message()
        raise ConfigError(f"{reason}{'' if reason[-1] in '.?' else '.'}{usage}") from error
