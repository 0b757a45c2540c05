"""Callbacks that record metrics, rank events, seconds and checkpoints during training.

On a resume, lines of steps after the checkpoint are dropped, so that no step occurs twice.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.files.json_files import append_line, write_lines
from dynlora.files.whole import remove
from dynlora.runs.checkpoints import checkpoints
from dynlora.runs.lines import read_metrics
from dynlora.runs.resume import Past, save_progress

_AT_LAST = {"train_runtime", "best_loss"}
"""Keys of lines written after a run's last step."""


class MetricsRecorder(TrainerCallback):
    """Writes one line of metrics.jsonl per log entry, and sums the evaluation time."""

    def __init__(self, path: Path) -> None:
        """Store the path; `start` creates the file."""
        self.path = path
        self.seconds = 0.0
        """Time in evaluations."""
        self.of_best = False
        """Whether evaluations are of the best checkpoint instead of the last step."""
        self._early: list[dict[str, Any]] | None = []

    def start(self, past: Past | None) -> None:
        """Create the file with earlier log entries and a resumed run's lines.

        Lines after the resumed checkpoint and final lines of a finished run are dropped.
        """
        lines, self._early = self._early or [], None
        if past is not None:
            lines += [
                line
                for line in read_metrics(past.source.metrics)[0]
                if line["step"] <= past.step and not line.keys() & _AT_LAST
            ]
        write_lines(self.path, lines)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the log entry to the file, or keep it until `start`."""
        values = logs or {}
        self.seconds += values.get("eval_runtime", 0.0)
        if self.of_best:
            values = {key.replace("eval_", "best_", 1): value for key, value in values.items()}
        line = {"step": state.global_step, **values}
        if self._early is None:
            append_line(self.path, line)
        else:
            self._early.append(line)


def started(callback: DynamicLoraCallback) -> DynamicLora:
    """Return the callback's controller, which exists once training has begun.

    Raises:
        RuntimeError: If training has not begun.
    """
    if callback.dynamic is None:
        raise RuntimeError("the controller exists from on_train_begin on")
    return callback.dynamic


class RankRecorder(TrainerCallback):
    """Writes one line of ranks.jsonl per event; must run after the dynamic callback."""

    def __init__(self, path: Path, source: DynamicLoraCallback) -> None:
        """Store the path and the callback that changes ranks."""
        self.path = path
        self.source = source
        self.initial: dict[str, int] = {}
        """Rank by module name before the run's first event."""
        self._written = 0

    @property
    def dynamic(self) -> DynamicLora:
        """The controller; exists once training has begun."""
        return started(self.source)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Create the file with the events of a resumed run, if any."""
        history = self.dynamic.history
        write_lines(self.path, [event.to_dict() for event in history])
        self._written = len(history)
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
    """Sums the seconds in optimizer steps; must run after the dynamic callback.

    Data loading, evaluation and checkpoints are excluded.
    """

    def __init__(self) -> None:
        """Start at 0."""
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._began


class CheckpointRecorder(TrainerCallback):
    """Completes each checkpoint, then deletes old ones; must run last.

    The Trainer would delete earlier, and a run killed in between could lose its only checkpoint.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        metrics: MetricsRecorder,
        *,
        limit: int | None,
        best: Path | None = None,
    ) -> None:
        """Prepare for a run.

        Args:
            stopwatch: Supplies the training seconds to save.
            metrics: Supplies the evaluation seconds to save.
            limit: Maximum number of checkpoints; the newest and best always stay. None keeps all.
            best: Best checkpoint of a resumed run, if any.
        """
        self.stopwatch = stopwatch
        self.metrics = metrics
        self.limit = limit
        self.best = best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the current path of a resumed run's best checkpoint.

        The Trainer stores the original path, and drops it if the folder was moved or the working
        directory changed.
        """
        if self.best is not None and self.best.is_dir():
            state.best_model_checkpoint = str(self.best)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the checkpoint, and delete old checkpoints beyond the limit."""
        save_progress(
            Path(str(args.output_dir)) / f"checkpoint-{state.global_step}",
            step=state.global_step,
            train=self.stopwatch.seconds,
            evaluation=self.metrics.seconds,
        )
        if self.limit is not None:
            kept = {f"checkpoint-{state.global_step}"}
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                kept.add(Path(state.best_model_checkpoint).name)
            _delete_old(checkpoints(Path(str(args.output_dir))), self.limit, kept)


def _delete_old(saved: Mapping[int, Path], limit: int, kept: set[str]) -> None:
    """Delete the oldest checkpoints beyond a limit, except the names in `kept`."""
    others = [saved[step] for step in sorted(saved) if saved[step].name not in kept]
    for path in others[: max(0, len(saved) - limit)]:
        remove(path)
