"""Entry of the command line `dynlora`: select the verb and turn errors into exit codes.

0: success. 2: the user must correct the input. 130 and 143: stopped by the user. 141: the reader of
the output, such as `head`, closed the pipe. Other errors are bugs and keep their traceback.
"""

import logging
import os
import platform
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from click.shell_completion import shell_complete
from rich.table import Table
from rich.text import Text

from dynlora.cli.arguments import WIDTH, action, call, common_options
from dynlora.cli.completion import VARIABLE
from dynlora.cli.output import Output, ReaderLeftError, drop_pending, only_errors
from dynlora.errors import DynamicLoraError, is_out_of_memory
from dynlora.report.wording import shorten
from dynlora.runs.record import installed, release
from dynlora.train.processes import in_group, is_first, leave, one_error
from dynlora.train.signals import ReportedError, sigterm_stops

VERBS = (
    "init", "examples", "train", "plan", "advise", "eval", "predict", "watch", "report",
    "compare", "inspect", "diff", "combine", "extract", "export", "resize", "schema", "completion",
)  # fmt: skip
"""The verbs; `COMMAND` in `dynlora.cli.<verb>` is the command of each."""
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes",
    "safetensors", "gguf", "tensorboard", "wandb", "trackio",
)  # fmt: skip
"""Packages whose versions a bug report needs."""
NVIDIA = Path("/proc/driver/nvidia/version")  # file with the NVIDIA driver's version on Linux
OUTPUT_OPTIONS = ("--json", "--quiet")
SHOWN = 100  # maximum characters of a path in an error, because it may be pasted text
LONGEST_ERROR = 4000  # maximum characters of an error, because quoted values may be huge


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dynlora` with the arguments, or the process's own, and return the exit code."""
    if instruction := os.environ.get(VARIABLE):
        return shell_complete(dynlora(), {}, "dynlora", VARIABLE, instruction)
    command = partial(run_command, argv, _dispatch)
    return leave(command) if in_group() else command()


def run_command(argv: Sequence[str] | None, dispatch: Callable[[list[str], Output], None]) -> int:
    """Run a command and return the exit code; an expected error becomes one line.

    `dispatch` runs the command of the arguments without output options.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    first = is_first()  # other processes print errors only
    output = Output(as_json=first and "--json" in given, quiet=not first or "--quiet" in given)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it remarks on its own import
    try:
        with sigterm_stops(), only_errors() if output.quiet else nullcontext(), one_error():
            dispatch([word for word in given if word not in OUTPUT_OPTIONS], output)
            output.finish()
    except DynamicLoraError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is None or error.errno is None:
            raise
        path = shorten(str(error.filename), SHOWN)
        return _refuse(f"a path must be accessible, but got {path} ({error.strerror}).")
    except (ReaderLeftError, ReportedError) as end:
        return end.code
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return _refuse(_short_of_memory(error))
    except KeyboardInterrupt as stop:
        how = str(stop) or "before anything was written"
        _tell(f"interrupted: {how}\n")
        return 128 + getattr(stop, "signum", signal.SIGINT)
    finally:
        _tell("")  # libraries' text that cannot be written would change the exit code
    return 0


def _refuse(reason: str) -> int:
    line = re.sub(r"\s*[\r\n]\s*", " ", reason.strip())  # paths keep their spaces
    _tell(f"error: {shorten(line, LONGEST_ERROR)}\n")
    return 2


def _tell(text: str) -> None:
    """Write text and all pending text on standard error, if there is one.

    Ignores failures, because the exit code reports the error too.
    """
    if sys.stderr is None:
        return
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        drop_pending(sys.stderr)


def _short_of_memory(error: Exception) -> str:
    said = next(iter(str(error).splitlines()), "no details")
    return (
        f"there must be enough memory, but got {said}. Use smaller batches "
        "(`--training.batch_size` with more `--training.gradient_accumulation`, or "
        "`--batch-size`), a lower `--data.max_length` or a lower `--lora.r`; `dynlora plan CONFIG "
        "--measure` measures the peak memory of each method."
    )


class Verbs(click.Group):
    """The verbs of `dynlora`, each imported only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a verb; None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"dynlora.cli.{cmd_name}").COMMAND
        return command


def dynlora() -> Verbs:
    """Return the whole command line."""
    text = "Show the version and the environment."
    version = action("--version", text, lambda ctx: _show_environment(ctx.obj))
    names: dict[str, Any] = dict.fromkeys(VERBS)  # of which click suggests the nearest
    return Verbs(
        "dynlora",
        commands=names,
        help="Fine-tune with LoRA ranks that move between layers while the model trains.",
        params=[*common_options(), version],
        subcommand_metavar="VERB ...",
        add_help_option=False,
        no_args_is_help=False,
        context_settings=WIDTH,
    )


def _show_environment(output: Output) -> None:
    """Print the versions of all relevant packages, which are not imported, and the machine."""
    found = {
        "dynlora": release(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count() or "unknown"),
        "threads": os.environ.get("OMP_NUM_THREADS") or "as torch chooses",
        "nvidia driver": _nvidia_driver(),
    }
    found |= {package: installed(package) for package in PACKAGES}
    table = Table.grid(padding=(0, 2))
    for name, value in found.items():
        table.add_row(name, Text(value))
    output.show(table, found)


def _nvidia_driver() -> str:
    try:
        return NVIDIA.read_text(encoding="utf-8").partition("\n")[0].removeprefix("NVRM version: ")
    except OSError:
        return "none found"


def _dispatch(arguments: list[str], output: Output) -> None:
    call(dynlora(), arguments or ["--help"], output)
