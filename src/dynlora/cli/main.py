"""`dynlora`: the command line's entry, which finds the verb and turns errors into exit codes.

Exit code 0: done. 2: the input must be mended; one line on the standard error says how. 130: the
user stopped it; one line says how to go on. Anything else is a bug of ours and keeps its traceback.
"""

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from dynlora.cli import train
from dynlora.errors import ConfigError, DynamicLoraError

HELP = """\
usage: dynlora VERB ...

Fine-tune with LoRA ranks that move between layers while the model trains.

verbs:
  train CONFIG    train and evaluate as CONFIG (a YAML file) says

options:
  -h, --help      show this help; `dynlora VERB --help` shows a verb's
  --version       show the version
"""

VERBS: Mapping[str, Callable[[Sequence[str]], None]] = {"train": train.run}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 2 or 130.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except DynamicLoraError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        how = str(stop) or "before training began; nothing was written"
        print(f"interrupted: {how}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _dispatch(arguments: list[str]) -> None:
    verb = arguments[0] if arguments else "--help"
    if verb in {"-h", "--help"}:
        print(HELP, end="")
    elif verb == "--version":
        print(f"dynlora {_version()}")
    elif verb in VERBS:
        VERBS[verb](arguments[1:])
    else:
        raise ConfigError(
            f"the first argument must be a verb ({', '.join(VERBS)}), got {verb!r}: "
            "see `dynlora --help`."
        )


def _version() -> str:
    try:
        return version("dynlora")
    except PackageNotFoundError:
        return "(run from source, not installed)"


if __name__ == "__main__":
    sys.exit(main())
