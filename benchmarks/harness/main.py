"""Entry of the harness: select the command, and turn errors into exit codes as `dynlora` does."""

from collections.abc import Sequence

from dynlora.cli.main import run_command
from dynlora.cli.output import Output

REPORT = "report"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m benchmarks`.

    Args:
        argv: Arguments without the program name; None uses the process's arguments.

    Returns:
        The exit code, as documented for `dynlora`.
    """
    return run_command(argv, _dispatch)


def _dispatch(arguments: list[str], output: Output) -> None:
    if arguments[:1] == [REPORT]:
        from benchmarks.harness.report.command import run as report

        report(arguments[1:], output)
    else:
        from benchmarks.harness.command import run

        run(arguments, output)
