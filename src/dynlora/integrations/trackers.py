"""Send ranks to the trackers of a `Trainer`: TensorBoard, wandb or trackio.

The run and `state.log_history` do not change.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from statistics import mean
from typing import Any

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
        for event in history[self._sent :]:
            self._send(event_figures(event), state)
        self._sent = len(history)

    def _send(self, figures: Figures, state: State) -> None:
        if not state.is_world_process_zero:
            return
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardCallback):
                for name, value in figures.items():
                    tracker.tb_writer.add_scalar(name, value, state.global_step)
                tracker.tb_writer.flush()
            else:
                package = "wandb" if isinstance(tracker, WandbCallback) else "trackio"
                import_module(package).log({**figures, "train/global_step": state.global_step})
