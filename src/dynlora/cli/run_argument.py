"""The argument RUN of verbs that use a finished run, and `--model`, where its base model is now."""

from pathlib import Path
from typing import Any

from dynlora.cli.arguments import VerbParser
from dynlora.cli.job_parser import parse_job
from dynlora.errors import ConfigError


def add_run(parser: VerbParser) -> None:
    """Add RUN, `--model` and `--batch-size` to a verb's parser."""
    parser.add_argument("run", metavar="RUN", type=Path, help="folder that `dynlora train` wrote")
    parser.add_argument(
        "--model",
        metavar="PATH",
        type=Path,
        help="folder or GGUF file of the base model, if it is no longer where the run found it",
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=_at_least_one,
        help="rows in a forward pass (default: the run's training.eval_batch_size)",
    )


def _at_least_one(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


_at_least_one.__name__ = "a whole number of at least 1"  # as argparse calls it in its complaint


def open_run(run: Path, model: Path | None) -> Any:
    """Load a finished run.

    Args:
        run: Its folder.
        model: Where its base model is now; None takes its configuration's word.

    Returns:
        A `dynlora.train.finished_run.FinishedRun`.

    Raises:
        DynamicLoraError: If it is not a finished run, or what it needs is missing or broken.
    """
    from dynlora.train.finished_run import check_finished, load_run
    from dynlora.train.run_folder import RunFolder

    folder = RunFolder(run)
    check_finished(folder)
    config = parse_job([str(folder.config), *_moved(model)])
    assert config is not None
    if model is not None and config.method == "full":
        raise ConfigError(
            f"`--model` must be left out for a run with `method: full`, got {model}: {run} holds "
            "the whole model."
        )
    return load_run(folder, config)


def _moved(model: Path | None) -> list[str]:
    """Return the options that name another place of the base model."""
    if model is None:
        return []
    if model.suffix == ".gguf":
        return ["--model.path", str(model.parent), "--model.gguf_file", model.name]
    return ["--model.path", str(model), "--model.gguf_file", "null"]
