"""Trackers of a job: `training.report_to` in; the Trainer's own integrations, in the run's folder.

They start when the run's folder is there and before the seed is set, so that a run is the same with
and without them.
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
"""Name under which W&B and Trackio show runs, unless the environment names another."""
OWN_MODE = ("WANDB_MODE", "WANDB_API_KEY")
"""Environment variables with which a user says that W&B may be reached, or not."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is tracked."""

    folder: Path
    """The tracker's folder, which is there."""
    name: str
    """Name of the run."""
    first_step: int
    """First optimizer step to come."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """One tracker."""

    start: Callable[[Trainer, Place], TrainerCallback]
    finish: Callable[[Any], None]
    """Closes what `start` opened, unless the Trainer has."""


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
    """Let a trainer report to trackers while it trains.

    Args:
        trainer: Not training yet.
        names: Trackers, each at most once.
        folder: Where they may write; each gets a folder of its own in it. Its parent names the run.
        steps_done: Optimizer steps already taken, of a resumed run.
        ranks: Whether ranks move and are to be tracked.

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

    # Steps that a resumed run takes again are hidden, so that no step stands twice.
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
            # Its own words and its copy of ours stay out of both streams.
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
    os.environ.setdefault("TRACKIO_DIR", str(place.folder))  # read when trackio is loaded
    trainer.args.project, trainer.args.run_name = PROJECT, place.name
    with redirect_stdout(io.StringIO()):  # coloured advice, on terminals and elsewhere
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
