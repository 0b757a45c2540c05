"""Entry of the command line `dynlora`: select the verb and turn errors into exit codes.

Exit code 0: success. 2: the user must correct the input; one line on standard error explains how.
130 and 143: stopped by the user; one line explains how to resume. 141: the reader of the output,
such as `head`, closed the pipe. Other errors are bugs and keep their traceback.
"""

import difflib
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

from dynlora.cli.messages import fewer_remarks, only_errors
from dynlora.cli.output import Output, ReaderLeftError
from dynlora.cli.verbs import VERBS
from dynlora.errors import ConfigError, DynamicLoraError, is_out_of_memory
from dynlora.report.wording import shorten
from dynlora.train.signals import sigterm_stops

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
OWN_OPTIONS = ("--help", "--version")
"""Options in place of a verb."""
READER_LEFT = 141
"""Exit code of programs ended by a closed pipe: 128 plus 13, the number of SIGPIPE."""
SHOWN = 80
"""Maximum characters of a path in an error, because it may be pasted text."""
LONGEST_ERROR = 4000
"""Maximum characters of an error, because quoted values may be huge."""


Dispatch = Callable[[list[str], Output], None]
"""Runs the command given by the arguments without output options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynlora`.

    Args:
        argv: Arguments without the program name; None uses the process's arguments.

    Returns:
        The exit code: 0, 2, 130, 141 or 143.
    """
    return run_command(argv, _dispatch)


def run_command(argv: Sequence[str] | None, dispatch: Dispatch) -> int:
    """Run a command, and turn its errors into one line and an exit code.

    Args:
        argv: Arguments without the program name; None uses the process's arguments.
        dispatch: Runs the command.

    Returns:
        The exit code: 0, 2, 130, 141 or 143.

    Raises:
        OSError: If the operating system reports an error without a file name.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    output = Output(as_json="--json" in given, quiet="--quiet" in given)
    try:
        with sigterm_stops(), only_errors() if output.quiet else fewer_remarks():
            dispatch([word for word in given if word not in OUTPUT_OPTIONS], output)
            output.finish()
    except DynamicLoraError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is None or error.errno is None:
            raise
        return _refuse(_refused_file(error))
    except ReaderLeftError:
        return READER_LEFT
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _refuse(_short_of_memory(error))
    except KeyboardInterrupt as stop:
        how = str(stop) or "before anything was written"
        _tell(f"interrupted: {how}")
        return 128 + getattr(stop, "signum", signal.SIGINT)
    return 0


def _refuse(reason: str) -> int:
    _tell(f"error: {shorten(' '.join(reason.split()), LONGEST_ERROR)}")
    return 2


def _tell(line: str) -> None:
    """Print a line on standard error, ignoring failures: the exit code reports the error too."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _refused_file(error: OSError) -> str:
    """Describe the operating system's error for a path."""
    path = str(error.filename)
    shown = path if len(path) <= SHOWN else f"{path[:SHOWN]}... ({len(path)} characters)"
    return (
        f"a path must be one that the operating system lets dynlora use, got {shown}: "
        f"{error.strerror}."
    )


def _short_of_memory(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), "no more of it")
    return (
        f"there must be memory for what is asked, got {said}: use smaller batches "
        "(`--training.batch_size` with more `--training.gradient_accumulation`, or "
        "`--batch-size`), a lower `--data.max_length` or a lower `--lora.r`; `dynlora plan CONFIG "
        "--measure` measures the peak memory of each method."
    )


def _dispatch(arguments: list[str], output: Output) -> None:
    verb = arguments[0] if arguments else "--help"
    if verb in {"-h", "--help"}:
        width = max(len(entry.usage) for entry in VERBS.values())
        lines = (f"  {entry.usage:<{width}}  {entry.summary}" for entry in VERBS.values())
        output.line(USAGE.format(verbs="\n".join(lines)).rstrip())
    elif verb == "--version":
        _run("version", [], output)
    elif verb in VERBS:
        _run(verb, arguments[1:], output)
    else:
        near = difflib.get_close_matches(verb, [*VERBS, *OWN_OPTIONS], n=1)
        advice = f"the nearest is {near[0]}; " if near else ""
        raise ConfigError(
            f"the first argument must be a verb, got {verb!r}: {advice}see `dynlora --help`."
        )


def _run(module: str, arguments: list[str], output: Output) -> None:
    # Only now: a verb's module may be slow to import, and `--help` need not wait for it.
    import_module(f"dynlora.cli.{module}").run(arguments, output)


if __name__ == "__main__":
    sys.exit(main())
