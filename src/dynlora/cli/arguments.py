"""Arguments of verbs without a configuration: argparse, with its complaints as our errors."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dynlora.cli.verbs import VERBS
from dynlora.errors import ConfigError


class VerbParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises what it has to complain about."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint instead of printing it.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; usage: {self.format_usage().removeprefix('usage: ')}")


def verb_parser(verb: str) -> VerbParser:
    """Return a parser that knows a verb's name and purpose, and no argument yet."""
    return new_parser(f"dynlora {verb}", VERBS[verb].summary)


def new_parser(program: str, summary: str) -> VerbParser:
    """Return a parser without arguments.

    Args:
        program: The words that start the command, such as `dynlora train`.
        summary: The command's purpose, in a few words.
    """
    parser = VerbParser(
        prog=program,
        description=f"{summary[0].upper()}{summary[1:]}.",
        allow_abbrev=False,
    )
    # Every argument of `type=Path` is read by this.
    parser.register("type", Path, _path)
    return parser


def _path(text: str) -> Path:
    """Return the path of an argument; an empty one would be the current folder.

    Raises:
        argparse.ArgumentTypeError: If the text is empty or contains a NUL character.
    """
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path without NUL, got {text!r}: remove it")
    if not text.strip():
        raise argparse.ArgumentTypeError(
            f"must be a path, got {text!r}: an unset variable may stand there"
        )
    return Path(text)


def parse(parser: VerbParser, arguments: Sequence[str]) -> Any | None:
    """Return the parsed arguments; None after `--help`.

    Raises:
        ConfigError: If an argument is missing, unknown or of the wrong type.
    """
    try:
        return parser.parse_args(arguments)
    except SystemExit:  # how argparse ends after --help
        return None
