"""Command-line arguments of the harness, with argparse's errors as `ConfigError`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dynlora.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Parser that raises errors instead of printing them."""

    def __init__(self, program: str, summary: str) -> None:
        """Create a parser without arguments."""
        super().__init__(prog=program, description=summary, allow_abbrev=False)
        self.register("type", Path, _path)  # converts every argument of `type=Path`

    def error(self, message: str) -> NoReturn:
        """Raise the error.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; usage: {self.format_usage().removeprefix('usage: ')}")


def parse(parser: Parser, arguments: Sequence[str]) -> Any | None:
    """Return the parsed arguments; None after `--help`.

    Raises:
        ConfigError: If an argument is missing, unknown or of the wrong type.
    """
    try:
        return parser.parse_args(arguments)
    except SystemExit:  # raised by argparse after --help
        return None


def at_least_one(text: str) -> int:
    """Convert an argument to a positive number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, but got {text!r}")
    return int(text)


def _path(text: str) -> Path:
    """Convert an argument to a path; refuse an empty one, which would be the current folder."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, but got {text!r}. Is a variable unset?")
    return Path(text)
