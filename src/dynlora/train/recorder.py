"""Callbacks that write what happens while it happens: metrics, rank events, seconds.

On a resume the lines of the steps after the checkpoint are dropped, so that no step stands twice.
"""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.train.run_folder import append_line, read_lines, write_lines


class MetricsRecorder(TrainerCallback):
    """Writes a line of metrics.jsonl whenever the Trainer logs, and adds up evaluation time."""

    def __init__(self, path: Path) -> None:
        """Take the file to write."""
        self.path = path
        self.eval_seconds = 0.0

    def start(self, resumed_from: Path | None, step: int) -> None:
        """Begin the file: empty, or with the lines of a resumed run up to its checkpoint."""
        lines = [] if resumed_from is None else read_lines(resumed_from)
        write_lines(self.path, [line for line in lines if line["step"] <= step])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append what was logged."""
        values = logs or {}
        self.eval_seconds += values.get("eval_runtime", 0.0)
        append_line(self.path, {"step": state.global_step, **values})


def started(callback: DynamicLoraCallback) -> DynamicLora:
    """Return the callback's controller, which is there once training has begun.

    Raises:
        RuntimeError: If training has not begun.
    """
    if callback.dynamic is None:
        raise RuntimeError("the controller exists from on_train_begin on")
    return callback.dynamic


class RankRecorder(TrainerCallback):
    """Writes a line of ranks.jsonl for each event; must come after the dynamic callback."""

    def __init__(self, path: Path, source: DynamicLoraCallback) -> None:
        """Take the file to write and the callback that moves ranks."""
        self.path = path
        self.source = source
        self.initial: dict[str, int] = {}
        """Rank by module name before the run's first event."""
        self._written = 0
        self._seconds_before = 0.0

    @property
    def dynamic(self) -> DynamicLora:
        """The controller; there once training has begun."""
        return started(self.source)

    @property
    def seconds(self) -> float:
        """Time spent in the dynamic part by this process, in seconds."""
        return self.dynamic.seconds - self._seconds_before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file with the events that a resumed run brings along."""
        history = self.dynamic.history
        write_lines(self.path, [event.to_dict() for event in history])
        self._written = len(history)
        self._seconds_before = self.dynamic.seconds
        self.initial = self.dynamic.ranks
        if history:
            self.initial = {n: layer.rank_before for n, layer in history[0].layers.items()}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Append the events of this step."""
        history = self.dynamic.history
        for event in history[self._written :]:
            append_line(self.path, event.to_dict())
        self._written = len(history)


class Stopwatch(TrainerCallback):
    """Adds up the seconds in optimizer steps; must come after the dynamic callback.

    The batch's loading, evaluation and checkpoints are not part of them.
    """

    def __init__(self) -> None:
        """Start at 0."""
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop."""
        self.seconds += time.perf_counter() - self._began
