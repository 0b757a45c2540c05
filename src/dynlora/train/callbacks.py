"""Callbacks of a job's Trainer: show the progress, record the run, and decide when it stops.

Cluster schedulers send SIGTERM before they kill a job. All processes stop after the same step.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.distributed import max_over_processes, process_count, process_rank, wait_for_processes
from dynlora.files.json_files import append_line, write_lines
from dynlora.report.wording import lower_is_better
from dynlora.runs.checkpoints import delete_old, seal
from dynlora.runs.folder import RunFolder
from dynlora.runs.lines import metrics_until
from dynlora.runs.resume import Past
from dynlora.train.machine import peak_memory
from dynlora.train.signals import handling, stop_at_once

PLAIN_LINES = 10  # loss lines per run without a terminal
_USUAL: dict[signal.Signals, tuple[Any, ...]] = {
    signal.SIGINT: (signal.default_int_handler,),
    signal.SIGTERM: (signal.SIG_DFL, stop_at_once),
}
"""Default handlers that may be replaced, per signal."""
SAME_SECONDS = 1.0
"""Time in which signals count as one: a scheduler and a launcher may both send it."""


class ProgressBar(TrainerCallback):
    """A bar of optimizer steps with loss and ranks; above it a line per evaluation."""

    def __init__(
        self, console: Console, metrics: Sequence[str], source: DynamicLoraCallback | None
    ) -> None:
        """Prepare a bar for a terminal, and the order of the validation metrics.

        `source` has the ranks; None for methods with fixed ranks.
        """
        self.console = console
        self.metrics = metrics
        self.source = source
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=1,  # rich's 10 would take processor time from training
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=None, note="")
        self._tenth, self._noted = 0, -1
        self._loss = self._ranks = ""

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Show the bar."""
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        self._update_ranks()
        self.progress.start()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Advance the bar, and show the ranks."""
        self.progress.update(self.task, completed=state.global_step)
        self._update_ranks()

    def _update_ranks(self) -> None:
        """Note the ranks after a new event, and its agreement."""
        dynamic = None if self.source is None else self.source.dynamic
        if dynamic is None or len(dynamic.history) == self._noted:
            return
        self._noted, ranks = len(dynamic.history), dynamic.ranks.values()
        self._ranks = f"r {min(ranks)} to {max(ranks)}, median {median(ranks):g}"
        if dynamic.history:
            self._ranks += f", agreement {dynamic.history[-1].agreement:.1f}"
        self._note()

    def _note(self) -> None:
        note = " · ".join(filter(None, (self._loss, self._ranks)))
        self.progress.update(self.task, note=note)

    def on_log(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Show the loss beside the bar or as a line, and validation metrics as a line."""
        values: dict[str, float] = kwargs["logs"]
        if "loss" in values:
            self._loss = f"loss {values['loss']:.3f}"
            self._note()
            tenth = state.global_step * PLAIN_LINES // max(state.max_steps, 1)
            if not self.console.is_terminal and tenth > self._tenth:
                self._tenth = tenth
                self._print(state, f"training loss {values['loss']:.4f}")
        if "eval_loss" in values:
            found = [name for name in self.metrics if f"eval_{name}" in values]
            metrics = ", ".join(f"{name} {values[f'eval_{name}']:.4f}" for name in found)
            self._print(state, f"validation {metrics}")

    def _print(self, state: State, text: str) -> None:
        steps = f"{state.global_step}/{state.max_steps}" if state.max_steps else "0"
        self.console.print(f"step {steps}: {text}", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop the bar, which stays visible."""
        self.progress.stop()


class Recorder(TrainerCallback):
    """Writes the files of a run's folder that grow in training; must be the last callback."""

    def __init__(
        self, folder: RunFolder, source: DynamicLoraCallback | None, *, limit: int | None
    ) -> None:
        """Keep at most `limit` checkpoints, but always the newest and the best."""
        self.folder = folder
        self.source = source
        self.limit = limit
        self.train_seconds = 0.0
        """Time in optimizer steps, without data loading, evaluation and checkpoints."""
        self.eval_seconds = 0.0
        self.of_best = False
        """Whether evaluations are of the best checkpoint instead of the last step."""
        self.initial_ranks: dict[str, int] = {}
        """Rank by module name before the run's first event; empty for methods with fixed ranks."""
        self._early: list[dict[str, Any]] | None = []
        self._step_began = 0.0
        self._events_written = 0

    @property
    def dynamic(self) -> DynamicLora | None:
        """The controller, which exists once training has begun; None for fixed ranks."""
        return None if self.source is None else self.source.dynamic

    def open(self, past: Past | None) -> None:
        """Create `metrics.jsonl` with earlier log entries, after a resumed run's lines."""
        lines, self._early = self._early or [], None
        if past is not None:
            self.train_seconds, self.eval_seconds = past.train_seconds, past.eval_seconds
            lines += metrics_until(past.source.metrics, past.step)
        write_lines(self.folder.metrics, lines)

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Create `ranks.jsonl` with a resumed run's events."""
        if self.dynamic is None:
            return
        history = self.dynamic.history
        write_lines(self.folder.ranks, [event.to_dict() for event in history])
        self._events_written = len(history)
        self.initial_ranks = self.dynamic.ranks
        if history:
            first = history[0].layers.items()
            self.initial_ranks = {name: layer.rank_before for name, layer in first}

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Start the clock."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop the clock, and append the events of this step."""
        self.train_seconds += time.perf_counter() - self._step_began
        if self.dynamic is None:
            return
        history = self.dynamic.history
        for event in history[self._events_written :]:
            append_line(self.folder.ranks, event.to_dict())
        self._events_written = len(history)

    def on_log(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Append the log entry and the peak memory to `metrics.jsonl`, or keep it until `open`."""
        values: dict[str, float] = kwargs["logs"]
        self.eval_seconds += values.get("eval_runtime", 0.0)
        if self.of_best:
            values = {key.replace("eval_", "best_", 1): value for key, value in values.items()}
        line = {"step": state.global_step, **values, **peak_memory()}
        if self._early is None:
            append_line(self.folder.metrics, line)
        else:
            self._early.append(line)

    def on_save(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Seal the checkpoint before old ones are deleted: the run may be killed in between."""
        name = f"checkpoint-{state.global_step}"
        seal(
            self.folder.checkpoints / name,
            step=state.global_step,
            train=self.train_seconds,
            evaluation=self.eval_seconds,
        )
        if self.limit is not None:
            kept = {name}
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                kept.add(Path(state.best_model_checkpoint).name)
            delete_old(self.folder.checkpoints, self.limit, kept)


class Stopping(TrainerCallback):
    """Stops training; must run after all callbacks that request checkpoints, except the recorder.

    transformers' `EarlyStoppingCallback` counts evaluations itself, and trains on after a resume
    from the checkpoint at which it stopped. This class reads the log instead.
    """

    def __init__(self, metric: str, patience: int | None) -> None:
        """Stop after `patience` consecutive evaluations in which `metric` does not improve."""
        self.metric = metric
        self.patience = patience
        self.complete = False
        """Whether the resumed run is complete, so that no step may follow. The Trainer itself
        checks only after a step, and from a checkpoint inside an epoch would train one more."""
        self.best: Path | None = None  # best checkpoint of the resumed run
        self.received = 0  # number of the signal that this process has received; 0 without one
        self.signum = 0  # number of the signal for which all processes stop after the current step
        self._since = 0.0  # time of the received signal
        self._parent = os.getppid()
        self._save_is_due = False

    def is_over(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the last `patience` evaluations of a log brought no improvement."""
        if self.patience is None:
            return False
        key = f"eval_{self.metric}"
        sign = -1.0 if lower_is_better(self.metric) else 1.0
        values = [sign * line[key] for line in log if key in line and line["step"] > 0]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience

    def listening(self) -> AbstractContextManager[None]:
        """Stop training after a signal, and at once after a later one; keep other handlers."""
        usual = [each for each, handlers in _USUAL.items() if signal.getsignal(each) in handlers]
        return handling(dict.fromkeys(usual, self._receive))

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = signum, time.monotonic()
            if process_rank() == 0:
                text = "stopping after this step; once more stops at once"
                print(text, file=sys.stderr, flush=True)
        elif time.monotonic() - self._since > SAME_SECONDS:
            stop_at_once(signum, frame)

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Restore the path of the best checkpoint, which the Trainer drops if the folder moved."""
        if self.best is not None and self.best.is_dir():
            state.best_model_checkpoint = str(self.best)

    def on_epoch_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop a complete run after this epoch, whose sampler is empty."""
        control.should_training_stop |= self.complete

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop after a signal; delay the checkpoint of an epoch's last step until its evaluation.

        A resumed run would otherwise miss that evaluation, and could stop early at another step.
        """
        if process_count() > 1 and os.getppid() != self._parent:
            self.received = signal.SIGTERM  # the launcher of the processes was killed
        self.signum = int(max_over_processes(torch.tensor(self.received)))
        if self.signum:
            control.should_save = control.should_training_stop = True
        ends = control.should_training_stop or float(state.epoch or 0).is_integer()
        self._save_is_due = control.should_save and ends and args.eval_strategy == "epoch"
        control.should_save &= not self._save_is_due

    def on_evaluate(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop training if `is_over`."""
        control.should_training_stop |= self.is_over(state.log_history)

    def on_save(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Wait until all processes have written their files of the checkpoint."""
        wait_for_processes()

    def on_epoch_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Request the delayed checkpoint; skip the evaluation of an incomplete epoch."""
        control.should_save |= self._save_is_due
        self._save_is_due = False
        if self.signum and not float(state.epoch or 0).is_integer():
            control.should_evaluate = False
        if self.complete:  # logged, evaluated and saved before the checkpoint
            control.should_log = control.should_evaluate = control.should_save = False
