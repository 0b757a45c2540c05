"""Commands and arguments of the command line, built on click."""

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from dynlora.cli.output import Output
from dynlora.errors import ConfigError

WIDTH = {"max_content_width": 100}  # columns of help at most
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # `owner/name`, or `name` for old models
Run = Callable[[Any, Output], None]  # runs a command with its parsed arguments, as attributes


class Verb(click.Command):
    """A command that runs with its arguments and the `Output` of the call."""

    def __init__(self, name: str, summary: str, run: Run, parameters: Sequence[click.Parameter]):
        """Create a command; `summary` is its purpose in a few words, for help."""
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


class PathType(click.Path):
    """A path; empty ones are refused, because they would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not str(value).strip():
            self.fail(f"it must be a path, but got {value!r}. Is a variable unset?", param, ctx)
        return super().convert(value, param, ctx)


def option(usage: str, text: str, kind: Any = None, **settings: Any) -> click.Option:
    """Return an option with a value; `usage` is its name, and perhaps the value's: `--rank R`."""
    name, _, value = usage.partition(" ")
    return click.Option([name], metavar=value or None, type=kind, help=text, **settings)


def flag(names: str, text: str, **settings: Any) -> click.Option:
    """Return an option without a value."""
    return click.Option(names.split(), is_flag=True, help=text, **settings)


def action(names: str, text: str, show: Callable[[click.Context], None]) -> click.Option:
    """Return an option that shows something instead of running the command."""

    def callback(ctx: click.Context, _: click.Parameter, given: bool) -> None:
        if given and not ctx.resilient_parsing:
            show(ctx)
            ctx.exit()

    return flag(names, text, is_eager=True, callback=callback, expose_value=False)


FILE, FOLDER = PathType(path_type=Path), PathType(file_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)
RELATIVE_ERROR = click.FloatRange(0, 1, max_open=True)
ADAPTER = click.Argument(
    ["adapter"],
    type=FILE,
    metavar="ADAPTER",
    help="Folder of a PEFT LoRA adapter, or a .safetensors file of kohya or diffusers.",
)
NEW_ADAPTER = option(
    "--output PATH",
    "A new folder, or a new .safetensors file for kohya and diffusers.",
    FILE,
    required=True,
)
OVERWRITE = flag("--overwrite", "Replace an existing output.")
RUNS = click.Argument(
    ["runs"],
    metavar="RUN...",
    nargs=-1,
    required=True,
    type=FOLDER,
    help="Folders of `dynlora train` runs.",
)
LOADED_RUN = (
    click.Argument(["run"], metavar="RUN", type=FOLDER, help="Folder of a `dynlora train` run."),
    option(
        "--model PATH",
        "Folder, GGUF file or hub name of the base model, if it has moved since the run.",
    ),
    option(
        "--batch-size N",
        "Rows per forward pass (default: the run's training.eval_batch_size).",
        COUNT,
    ),
    option(
        "--input-adaptive",
        "Whether each row uses only as many components as its complexity needs (default: "
        "on for runs with dynamic.input_adaptive).",
        click.Choice(["on", "off"]),
    ),
)
"""Arguments of verbs that load a finished run with `open_run`."""


def common_options() -> list[click.Parameter]:
    """Return the options of every command."""
    hidden = {"expose_value": False}  # `run_command` reads both, which may stand anywhere
    return [
        flag("--json", "Print the result as one JSON object on standard output.", **hidden),
        flag("--quiet", "Print only errors, and the result with --json.", **hidden),
        action("-h --help", "Show this help.", lambda ctx: ctx.obj.line(ctx.get_help())),
    ]


def call(command: click.Command, words: Sequence[str], output: Output) -> None:
    """Run a command on `words`, the command line without the command's name."""
    try:
        with command.make_context(command.name, list(words), obj=output) as context:
            command.invoke(context)
    except click.exceptions.Exit:
        return
    except click.UsageError as error:
        usage = "" if error.ctx is None else f" {error.ctx.get_usage()}"
        reason = error.format_message()
        raise ConfigError(f"{reason}{'' if reason[-1] in '.?' else '.'}{usage}") from error


def open_run(
    run: Path, model: str | None, input_adaptive: str | None, max_new_tokens: int | None = None
) -> Any:
    """Load a finished run as a `dynlora.train.finished_run.FinishedRun`.

    `model` is the current location of the base model. None for an argument keeps the run's setting.
    """
    from dynlora.input_adaptive.file import load_input_adaptive
    from dynlora.runs.folder import RunFolder
    from dynlora.runs.reader import check_finished
    from dynlora.train.config_file import read_job
    from dynlora.train.finished_run import load_run

    folder = RunFolder(run)
    check_finished(folder)
    written = {} if max_new_tokens is None else {"data.max_new_tokens": max_new_tokens}
    config = read_job(folder.config, moved(model) | written)
    writing = ("causal_lm", "dpo", "image_text_to_text")
    if max_new_tokens is not None and config.task not in writing:
        raise ConfigError(
            f"`--max-new-tokens` goes with runs that write text only, got {max_new_tokens} "
            f"for {run}, a run of `task: {config.task}`: leave it out."
        )
    if model is not None and config.method == "full":
        raise ConfigError(
            f"`--model` must be left out for a run with `method: full`, got {model}: {run} holds "
            "the whole model."
        )
    trained = config.method == "dynamic" and config.dynamic.input_adaptive
    if input_adaptive == "on" and not trained:
        raise ConfigError(
            f"`--input-adaptive on` goes with runs of `dynamic.input_adaptive: true` only, got "
            f"{run}, which was trained without: leave it out."
        )
    loaded = load_run(folder, config)
    if trained and input_adaptive != "off":
        load_input_adaptive(loaded.model, folder.adapter)
    return loaded


def moved(model: str | None) -> dict[str, str | None]:
    """Return the keys that override the location of the base model."""
    if model is None:
        return {}
    path = Path(model)
    if path.suffix.lower() == ".gguf":
        return {"model.path": str(path.parent), "model.gguf_file": path.name}
    keys: dict[str, str | None] = {"model.path": model, "model.gguf_file": None}
    if not path.exists() and HUB_NAME.fullmatch(model):
        keys |= {"model.path": None, "model.name": model, "model.package": None}
    return keys
