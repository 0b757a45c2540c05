"""Callbacks that write what happens while it happens: metrics, rank events, seconds.

On a resume the lines of the steps after the checkpoint are dropped, so that no step stands twice.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.files.json_files import append_line, write_lines
from dynlora.files.whole import remove
from dynlora.report.line_files import read_metrics
from dynlora.report.unfinished import checkpoints
from dynlora.train.resume import Past, save_progress

_AT_LAST = {"train_runtime", "best_loss"}
"""Keys of the lines that a run writes when its steps are over."""


class MetricsRecorder(TrainerCallback):
    """Writes a line of metrics.jsonl whenever the Trainer logs, and adds up evaluation time."""

    def __init__(self, path: Path) -> None:
        """Take the file to write."""
        self.path = path
        self.seconds = 0.0
        """Time in evaluations."""
        self.of_best = False
        """Whether what is evaluated is the best checkpoint, no more the model of the last step."""
        self._early: list[dict[str, Any]] | None = []

    def start(self, past: Past | None) -> None:
        """Begin the file with what was logged before, and with a resumed run's lines.

        Lines after the resumed checkpoint are dropped, and what a run that had ended said at last.
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
        """Append what was logged."""
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

    @property
    def dynamic(self) -> DynamicLora:
        """The controller; there once training has begun."""
        return started(self.source)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file with the events that a resumed run brings along."""
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


class CheckpointRecorder(TrainerCallback):
    """Completes each checkpoint; must come last, since what it writes says that all is there.

    Older ones are deleted only then: the Trainer would do so before, and a run that keeps one
    checkpoint, killed in between, would have none.
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
            stopwatch: Whose seconds a resumed run shall go on from.
            metrics: The same of evaluations.
            limit: Checkpoints to keep, and the best one if that is what the run shall end with;
                None keeps all.
            best: The best checkpoint that a resumed run brings along, if there is one.
        """
        self.stopwatch = stopwatch
        self.metrics = metrics
        self.limit = limit
        self.best = best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the best checkpoint of a resumed run where that run lies now.

        The Trainer knows it by the path that it had, and forgets it where that leads nowhere, as
        after the folder was moved or from another working directory.
        """
        if self.best is not None and self.best.is_dir():
            state.best_model_checkpoint = str(self.best)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the seconds so far into the checkpoint, and delete what is one too many."""
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
    """Delete the oldest of what is saved beyond a limit, but none of these names."""
    others = [saved[step] for step in sorted(saved) if saved[step].name not in kept]
    for path in others[: max(0, len(saved) - limit)]:
        remove(path)
