"""The arguments RUN and `--model` of verbs that load a finished run."""

import re
from pathlib import Path
from typing import Any

from dynlora.cli.arguments import VerbParser
from dynlora.cli.job_parser import parse_job
from dynlora.errors import ConfigError

GGUF = ".gguf"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""Name of a model on the Hugging Face hub: `owner/name`, or `name` for old ones."""


def add_run(parser: VerbParser) -> None:
    """Add RUN, `--model`, `--batch-size` and `--input-adaptive` to a verb's parser."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that `dynlora train` wrote")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="folder, GGUF file or hub name of the base model, if it is no longer where the run "
        "found it",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=at_least_one,
        help="rows in a forward pass (default: the run's training.eval_batch_size)",
    )
    parser.add_argument(
        "--input-adaptive",
        choices=("on", "off"),
        help="whether each row uses only as many components as its complexity asks for (default: "
        "on for runs trained with dynamic.input_adaptive)",
    )


def at_least_one(text: str) -> int:
    """Convert an option to a positive number; argparse reports the `ValueError`."""
    count = int(text)
    if count < 1:
        raise ValueError
    return count


at_least_one.__name__ = "a whole number of at least 1"  # name in argparse's error


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
    written = [] if max_new_tokens is None else [f"--data.max_new_tokens={max_new_tokens}"]
    config = parse_job([str(folder.config), *_moved(model), *written])
    assert config is not None
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


def _moved(model: str | None) -> list[str]:
    """Return the options that override the location of the base model."""
    if model is None:
        return []
    path = Path(model)
    if path.suffix.lower() == GGUF:
        return ["--model.path", str(path.parent), "--model.gguf_file", path.name]
    if not path.exists() and HUB_NAME.fullmatch(model):
        hub = ["--model.name", model, "--model.path", "null", "--model.package", "null"]
        return [*hub, "--model.gguf_file", "null"]
    return ["--model.path", model, "--model.gguf_file", "null"]
