"""`dynlora compare A B ...`: read finished runs and print their differences."""

from collections.abc import Sequence
from pathlib import Path

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.output import Output
from dynlora.errors import ConfigError


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `compare` on the command line.
        output: Shows the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return
    if len(given.runs) < 2:
        names = f"got {len(given.runs)}" + "".join(f", {path}" for path in given.runs)
        raise ConfigError(f"`dynlora compare` needs at least two runs, {names}: give another.")

    # Only now: these load torch, and `--help` need not wait for it.
    from dynlora.report.comparison import compare_runs, read_finished
    from dynlora.report.comparison_table import comparison_table

    found = compare_runs([read_finished(path) for path in given.runs])
    output.show(comparison_table(found), found.to_dict())


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = verb_parser("compare")
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="*", help="folders of two or more finished runs"
    )
    return parser
