"""The arguments RUN and `--model` of verbs that load a finished run."""

import re
from pathlib import Path
from typing import Any

import click

from dynlora.cli.arguments import COUNT, FOLDER
from dynlora.errors import ConfigError
from dynlora.train.config_file import read_job

GGUF = ".gguf"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""Name of a model on the Hugging Face hub: `owner/name`, or `name` for old ones."""


OVERWRITE = click.Option(["--overwrite"], is_flag=True, help="Replace an existing output.")


def run_parameters() -> list[click.Parameter]:
    """Return RUN, `--model`, `--batch-size` and `--input-adaptive`."""
    return [
        click.Argument(
            ["run"], metavar="RUN", type=FOLDER, help="Folder of a `dynlora train` run."
        ),
        click.Option(
            ["--model"],
            metavar="PATH",
            help="Folder, GGUF file or hub name of the base model, if it has moved since the run.",
        ),
        click.Option(
            ["--batch-size"],
            metavar="N",
            type=COUNT,
            help="Rows per forward pass (default: the run's training.eval_batch_size).",
        ),
        click.Option(
            ["--input-adaptive"],
            type=click.Choice(["on", "off"]),
            help="Whether each row uses only as many components as its complexity needs (default: "
            "on for runs with dynamic.input_adaptive).",
        ),
    ]


def open_run(
    run: Path, model: str | None, input_adaptive: str | None, max_new_tokens: int | None = None
) -> Any:
    """Load a finished run.

    Args:
        run: Folder of the run.
        model: Current location of the base model; None uses the run's configuration.
        input_adaptive: "on" or "off"; None uses the run's configuration.
        max_new_tokens: Maximum tokens to generate per row; None uses the run's configuration.

    Returns:
        A `dynlora.train.finished_run.FinishedRun`.

    Raises:
        DynamicLoraError: If the run is not finished, or a required file is missing or broken.
    """
    from dynlora.input_adaptive.file import load_input_adaptive
    from dynlora.runs.folder import RunFolder
    from dynlora.runs.reader import check_finished
    from dynlora.train.finished_run import load_run

    folder = RunFolder(run)
    check_finished(folder)
    written = {} if max_new_tokens is None else {"data.max_new_tokens": max_new_tokens}
    config = read_job(folder.config, _moved(model) | written)
    if max_new_tokens is not None and config.task != "causal_lm":
        raise ConfigError(
            f"`--max-new-tokens` goes with runs of `task: causal_lm` only, got {max_new_tokens} "
            f"for {run}, a run of {config.task}: leave it out."
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


def _moved(model: str | None) -> dict[str, str | None]:
    """Return the keys that override the location of the base model."""
    if model is None:
        return {}
    path = Path(model)
    if path.suffix.lower() == GGUF:
        return {"model.path": str(path.parent), "model.gguf_file": path.name}
    if not path.exists() and HUB_NAME.fullmatch(model):
        hub = {"model.name": model, "model.path": None, "model.package": None}
        return {**hub, "model.gguf_file": None}
    return {"model.path": model, "model.gguf_file": None}
