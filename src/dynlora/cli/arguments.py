"""Parse the arguments of verbs without a configuration, with argparse's errors as `ConfigError`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dynlora.cli.verbs import VERBS
from dynlora.errors import ConfigError


class VerbParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises errors instead of printing them."""

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of printing it.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; usage: {self.format_usage().removeprefix('usage: ')}")


def verb_parser(verb: str) -> VerbParser:
    """Return a parser with a verb's name and summary, but no arguments yet."""
    return new_parser(f"dynlora {verb}", VERBS[verb].summary)


def new_parser(program: str, summary: str) -> VerbParser:
    """Return a parser without arguments.

    Args:
        program: First words of the command, such as `dynlora train`.
        summary: Purpose of the command, in a few words.
    """
    parser = VerbParser(
        prog=program,
        description=f"{summary[0].upper()}{summary[1:]}.",
        allow_abbrev=False,
    )
    # Converts every argument of `type=Path`.
    parser.register("type", Path, _path)
    return parser


def _path(text: str) -> Path:
    """Convert an argument to a path; refuse empty ones, which would mean the current folder.

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
    except SystemExit:  # raised by argparse after --help
        return None
