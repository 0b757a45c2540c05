"""Start the trackers in `training.report_to`, before the seed is set: they change no run."""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

from dynlora.errors import ConfigError
from dynlora.integrations.trackers import track_ranks
from dynlora.train.config.sections import TrackerName

PROJECT = "dynlora"  # project name in W&B and Trackio; `WANDB_PROJECT` overrides it for W&B
OWN_MODE = ("WANDB_MODE", "WANDB_API_KEY")  # environment variables that override W&B's offline mode


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that each tracker's package is installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                f"`training.report_to` needs the package of each tracker, got {name}, which is not "
                f"installed: `pip install {name}`, or leave it out."
            )


@contextmanager
def tracking(
    trainer: Trainer, names: Sequence[TrackerName], folder: Path, *, steps_done: int, ranks: bool
) -> Iterator[None]:
    """Report a Trainer's logs, and `ranks`, inside the block, in one folder per tracker."""
    before = list(trainer.callback_handler.callbacks)
    with ExitStack() as trackers:
        trackers.callback(setattr, trainer.callback_handler, "callbacks", before)
        for name in dict.fromkeys(names):
            (folder / name).mkdir(parents=True, exist_ok=True)
            start = TRACKERS[name](trainer, folder / name, steps_done + 1)
            trainer.add_callback(trackers.enter_context(start))
        if names and ranks:
            track_ranks(trainer)
        yield


@contextmanager
def _tensorboard(_: Trainer, folder: Path, first_step: int) -> Iterator[TrainerCallback]:
    from torch.utils.tensorboard import SummaryWriter

    # Hide logged steps that will be repeated.
    writer = SummaryWriter(str(folder), purge_step=first_step)
    callback: Any = integration_utils.TensorBoardCallback(writer)  # type: ignore[no-untyped-call]
    try:
        yield callback
    finally:
        if callback.tb_writer is not None:
            callback.tb_writer.close()


@contextmanager
def _wandb(trainer: Trainer, folder: Path, _: int) -> Iterator[TrainerCallback]:
    wandb = import_module("wandb")
    try:
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.parent.parent.name,  # of the run's folder
            dir=str(folder),
            mode=None if any(key in os.environ for key in OWN_MODE) else "offline",
            # Print nothing, and do not capture stdout and stderr.
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"`training.report_to: [wandb]` needs a run that wandb can start, got: {error}. Set "
            "WANDB_MODE=offline, or mend what it says."
        ) from error
    try:
        yield _set_up(integration_utils.WandbCallback(), trainer)  # type: ignore[no-untyped-call]
    finally:
        wandb.finish()


@contextmanager
def _trackio(trainer: Trainer, folder: Path, _: int) -> Iterator[TrainerCallback]:
    os.environ.setdefault("TRACKIO_DIR", str(folder))  # trackio reads it at import
    trainer.args.project, trainer.args.run_name = PROJECT, folder.parent.parent.name
    with redirect_stdout(io.StringIO()):  # trackio prints advice
        callback = _set_up(integration_utils.TrackioCallback(), trainer)  # type: ignore[no-untyped-call]
    try:
        yield callback
    finally:
        trackio = import_module("trackio")
        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()


def _set_up(callback: Any, trainer: Trainer) -> Any:
    callback.setup(trainer.args, trainer.state, trainer.model)
    return callback


TRACKERS: Mapping[
    TrackerName, Callable[[Trainer, Path, int], AbstractContextManager[TrainerCallback]]
] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
"""Start a tracker from the Trainer, the tracker's folder and the next optimizer step."""
