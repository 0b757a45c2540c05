"""Start the trackers in `training.report_to`, with their files in the run's folder.

They start before the seed is set, so that trackers do not change a run.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from dynlora.errors import ConfigError
from dynlora.integrations.trackers import track_ranks
from dynlora.train.config.training import TrackerName

PROJECT = "dynlora"
"""Project name in W&B and Trackio; `WANDB_PROJECT` overrides it for W&B."""
OWN_MODE = ("WANDB_MODE", "WANDB_API_KEY")
"""Environment variables that override W&B's offline mode."""


@dataclass(frozen=True, slots=True)
class Place:
    """Folder, name and first step of a tracked run."""

    folder: Path
    """The tracker's existing folder."""
    name: str
    """Name of the run."""
    first_step: int
    """Next optimizer step."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """One tracker."""

    start: Callable[[Trainer, Place], TrainerCallback]
    finish: Callable[[Any], None]
    """Closes the tracker, if the Trainer has not."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Check that each tracker's package is installed.

    Raises:
        ConfigError: If one is not.
    """
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
    """Report a Trainer's logs to trackers inside the block.

    Args:
        trainer: Trainer before training.
        names: Trackers; duplicates are ignored.
        folder: Parent of one folder per tracker, in the run's folder, which names the run.
        steps_done: Completed optimizer steps of a resumed run.
        ranks: Whether to track ranks.

    Raises:
        ConfigError: If a tracker cannot be started.
    """
    started: list[tuple[Tracker, TrainerCallback]] = []
    before = list(trainer.callback_handler.callbacks)
    try:
        for name in dict.fromkeys(names):
            place = Place(folder / name, folder.parent.name, steps_done + 1)
            place.folder.mkdir(parents=True, exist_ok=True)
            tracker = TRACKERS[name]
            callback = tracker.start(trainer, place)
            started.append((tracker, callback))
            trainer.add_callback(callback)
        if started and ranks:
            track_ranks(trainer)
        yield
    finally:
        trainer.callback_handler.callbacks = before
        for tracker, callback in started:
            tracker.finish(callback)


def _start_tensorboard(_trainer: Trainer, place: Place) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter

    # Hide logged steps that will be repeated.
    writer = SummaryWriter(str(place.folder), purge_step=place.first_step)
    callback: TrainerCallback = TensorBoardCallback(writer)  # type: ignore[no-untyped-call]
    return callback


def _finish_tensorboard(callback: Any) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.close()


def _start_wandb(trainer: Trainer, place: Place) -> TrainerCallback:
    wandb = import_module("wandb")
    try:
        wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=place.name,
            dir=str(place.folder),
            mode=None if any(key in os.environ for key in OWN_MODE) else "offline",
            # Print nothing, and do not capture stdout and stderr.
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"`training.report_to: [wandb]` needs a run that wandb can start, got: {error}. Set "
            "WANDB_MODE=offline, or mend what it says."
        ) from error
    return _set_up(WandbCallback(), trainer)  # type: ignore[no-untyped-call]


def _finish_wandb(_callback: Any) -> None:
    import_module("wandb").finish()


def _start_trackio(trainer: Trainer, place: Place) -> TrainerCallback:
    os.environ.setdefault("TRACKIO_DIR", str(place.folder))  # trackio reads it at import
    trainer.args.project, trainer.args.run_name = PROJECT, place.name
    with redirect_stdout(io.StringIO()):  # trackio prints advice
        return _set_up(TrackioCallback(), trainer)  # type: ignore[no-untyped-call]


def _finish_trackio(_callback: Any) -> None:
    trackio = import_module("trackio")
    if trackio.context_vars.current_run.get() is not None:
        trackio.finish()


def _set_up(callback: Any, trainer: Trainer) -> TrainerCallback:
    callback.setup(trainer.args, trainer.state, trainer.model)
    found: TrainerCallback = callback
    return found


TRACKERS: Mapping[TrackerName, Tracker] = {
    "tensorboard": Tracker(_start_tensorboard, _finish_tensorboard),
    "wandb": Tracker(_start_wandb, _finish_wandb),
    "trackio": Tracker(_start_trackio, _finish_trackio),
}
