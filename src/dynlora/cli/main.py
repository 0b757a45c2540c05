"""`dynlora`: the command line's entry, which finds the verb and turns errors into exit codes.

Exit code 0: done. 2: the input must be mended; one line on the standard error says how. 130: the
user stopped it; one line says how to go on. Anything else is a bug of ours and keeps its traceback.
"""

import difflib
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from dynlora.cli.messages import fewer_remarks, only_errors
from dynlora.cli.output import Output
from dynlora.cli.verbs import VERBS
from dynlora.errors import ConfigError, DynamicLoraError

USAGE = """\
usage: dynlora VERB ... [--json] [--quiet]

Fine-tune with LoRA ranks that move between layers while the model trains.

verbs:
{verbs}

options:
  --json          print the result as one JSON object on the standard output
  --quiet         print nothing but errors, and the result with --json
  -h, --help      show this help; `dynlora VERB --help` shows a verb's
  --version       show the version and the environment
"""
OUTPUT_OPTIONS = ("--json", "--quiet")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 2 or 130.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    output = Output(as_json="--json" in given, quiet="--quiet" in given)
    try:
        with only_errors() if output.quiet else fewer_remarks():
            _dispatch([word for word in given if word not in OUTPUT_OPTIONS], output)
    except DynamicLoraError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        how = str(stop) or "before anything was written"
        print(f"interrupted: {how}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _dispatch(arguments: list[str], output: Output) -> None:
    verb = arguments[0] if arguments else "--help"
    if verb in {"-h", "--help"}:
        width = max(len(entry.usage) for entry in VERBS.values())
        lines = (f"  {entry.usage:<{width}}  {entry.summary}" for entry in VERBS.values())
        print(USAGE.format(verbs="\n".join(lines)), end="")
    elif verb == "--version":
        _run("version", [], output)
    elif verb in VERBS:
        _run(verb, arguments[1:], output)
    else:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        advice = f"the nearest is {near[0]}; " if near else ""
        raise ConfigError(
            f"the first argument must be a verb, got {verb!r}: {advice}see `dynlora --help`."
        )


def _run(module: str, arguments: list[str], output: Output) -> None:
    # Only now: a verb's module may load much, and `--help` shall not wait for it.
    import_module(f"dynlora.cli.{module}").run(arguments, output)


if __name__ == "__main__":
    sys.exit(main())
