"""Send ranks to the trackers of a `Trainer`: TensorBoard, wandb or trackio.

Scalars at the start; at each event scalars, a histogram, and if Pillow is there a picture.

The run and `state.log_history` do not change.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from statistics import mean
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from transformers import Trainer, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from dynlora.errors import ConfigError
from dynlora.history import Event
from dynlora.integrations.trainer import DynamicLoraCallback

TRACKERS = (TensorBoardCallback, WandbCallback, TrackioCallback)

HISTOGRAM, PICTURE = "dynamic/ranks", "dynamic/rank_map"
CELL = (8, 32)  # height and width in pixels of one rank in a picture

Figures = dict[str, float]


def rank_figures(ranks: Mapping[str, int], parameters: int) -> Figures:
    """Return the figures of the current ranks; their names are stable between versions."""
    by_layer = {f"ranks/{name}": float(rank) for name, rank in ranks.items()}
    return by_layer | {
        "ranks/mean": float(mean(ranks.values())),
        "dynamic/parameters": float(parameters),
    }


def event_figures(event: Event) -> Figures:
    """Return the figures of the ranks after an event, its agreement and number of moved layers."""
    layers = event.layers.values()
    ranks = {name: layer.rank_after for name, layer in event.layers.items()}
    return rank_figures(ranks, event.parameters) | {
        "dynamic/agreement": event.agreement,
        "dynamic/moved_layers": float(sum(x.rank_before != x.rank_after for x in layers)),
    }


def rank_picture(events: Sequence[Event]) -> UInt8[np.ndarray, "height width 3"]:
    """Return the ranks of at least one event as a picture: the higher a rank, the darker.

    A row per layer, the first at the top; a column for the start and one per event.
    """
    columns = [[layer.rank_before for layer in events[0].layers.values()]]
    columns += [[layer.rank_after for layer in event.layers.values()] for event in events]
    ranks = np.array(columns).T
    shades = (255 * (1 - ranks / ranks.max())).astype(np.uint8)
    return np.repeat(np.kron(shades, np.ones(CELL, np.uint8))[:, :, None], 3, axis=2)


def track_ranks(trainer: Trainer) -> None:
    """Send ranks to a trainer's trackers; call before `trainer.train()`.

    Examples:
        >>> trainer = Trainer(model, args, callbacks=[DynamicLoraCallback()])
        >>> track_ranks(trainer)

    Args:
        trainer: Trainer with a `DynamicLoraCallback` and a tracker of `TRACKERS` in `report_to`.

    Raises:
        ConfigError: If the callback or the tracker is missing.
    """
    found: list[TrainerCallback] = trainer.callback_handler.callbacks
    sources = [callback for callback in found if isinstance(callback, DynamicLoraCallback)]
    trackers = [callback for callback in found if isinstance(callback, TRACKERS)]
    if not sources or not trackers:
        names = ", ".join(type(callback).__name__ for callback in found)
        raise ConfigError(
            "Tracking ranks needs a `DynamicLoraCallback` and a tracker, `report_to` tensorboard, "
            f"wandb or trackio, in the trainer, got the callbacks {names}: give it both."
        )
    trainer.add_callback(RankTracker(sources[0], trackers))


class RankTracker(TrainerCallback):
    """Sends ranks when training begins and after each event; add it after its trackers."""

    def __init__(self, source: DynamicLoraCallback, trackers: Sequence[TrainerCallback]) -> None:
        self._source, self._trackers = source, trackers
        self._sent = 0

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Send the initial ranks; skip the events from before a resume, which were sent then."""
        dynamic = self._source.dynamic
        assert dynamic is not None
        self._sent = len(dynamic.history)
        self._send(rank_figures(dynamic.ranks, dynamic.parameters), state)

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Send the events of this step."""
        assert self._source.dynamic is not None
        history = self._source.dynamic.history
        for count in range(self._sent + 1, len(history) + 1):
            self._send(event_figures(history[count - 1]), state, history[:count])
        self._sent = len(history)

    def _send(self, figures: Figures, state: State, events: Sequence[Event] = ()) -> None:
        """Send figures, and after an event its ranks as a histogram and all ranks as a picture."""
        if not state.is_world_process_zero:
            return
        step = state.global_step
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardCallback):
                for name, value in figures.items():
                    tracker.tb_writer.add_scalar(name, value, step)
                if events:
                    tracker.tb_writer.add_histogram(HISTOGRAM, _ranks_after(events[-1]), step)
                if events and find_spec("PIL"):
                    picture = rank_picture(events)
                    tracker.tb_writer.add_image(PICTURE, picture, step, dataformats="HWC")
                tracker.tb_writer.flush()
                continue
            package = import_module("wandb" if isinstance(tracker, WandbCallback) else "trackio")
            drawn: dict[str, Any] = {}
            if events:
                drawn[HISTOGRAM] = package.Histogram(_ranks_after(events[-1]))
            if events and find_spec("PIL"):
                drawn[PICTURE] = package.Image(rank_picture(events))
            package.log({**figures, **drawn, "train/global_step": step})


def _ranks_after(event: Event) -> Int[np.ndarray, " layers"]:
    return np.array([layer.rank_after for layer in event.layers.values()])
