"""Decide when training stops, and order an epoch's evaluation before its last checkpoint.

Cluster schedulers send SIGTERM before they kill a job. All processes stop after the same step.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora.distributed import max_over_processes, process_count, process_rank, wait_for_processes
from dynlora.report.wording import lower_is_better
from dynlora.train.signals import stop_at_once

_USUAL: dict[signal.Signals, tuple[Any, ...]] = {
    signal.SIGINT: (signal.default_int_handler,),
    signal.SIGTERM: (signal.SIG_DFL, stop_at_once),
}
"""Default handlers that may be replaced, per signal."""
SAME_SECONDS = 1.0
"""Time in which signals count as one: a scheduler and a launcher may both send it."""


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

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Stop training after a signal, and at once after a later one; keep other handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        now = {number: signal.getsignal(number) for number in _USUAL}
        replaced = {number: now[number] for number in now if now[number] in _USUAL[number]}
        for number in replaced:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)

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
