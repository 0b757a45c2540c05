"""Decide when training stops, and order an epoch's evaluation before its last checkpoint.

Cluster schedulers send SIGTERM before they kill a job.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora.report.wording import lower_is_better
from dynlora.train.signals import stop_at_once

_USUAL: dict[signal.Signals, tuple[Any, ...]] = {
    signal.SIGINT: (signal.default_int_handler,),
    signal.SIGTERM: (signal.SIG_DFL, stop_at_once),
}
"""Default handlers that may be replaced, per signal."""


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
        self.received: int | None = None
        """Number of the received signal."""
        self._save_is_due = False
        self._before: dict[signal.Signals, Any] = {}

    def is_over(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the last `patience` evaluations of a log brought no improvement."""
        if self.patience is None:
            return False
        key = f"eval_{self.metric}"
        sign = -1.0 if lower_is_better(self.metric) else 1.0
        values = [sign * line[key] for line in log if key in line]
        return bool(values) and len(values) - 1 - values.index(max(values)) >= self.patience

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Stop training after a signal, and at once after a second; keep other handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        now = {number: signal.getsignal(number) for number in _USUAL}
        self._before = {number: now[number] for number in now if now[number] in _USUAL[number]}
        for number in self._before:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._restore()

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._restore()
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_epoch_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop a complete run after this epoch, whose sampler is empty."""
        control.should_training_stop |= self.complete

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop after a signal; delay the checkpoint of an epoch's last step until its evaluation.

        A resumed run would otherwise miss that evaluation, and could stop early at another step.
        """
        if self.received is not None:
            control.should_save = control.should_training_stop = True
        ends = control.should_training_stop or float(state.epoch or 0).is_integer()
        self._save_is_due = control.should_save and ends and args.eval_strategy == "epoch"
        control.should_save &= not self._save_is_due

    def on_evaluate(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Stop training if `is_over`."""
        control.should_training_stop |= self.is_over(state.log_history)

    def on_epoch_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Request the delayed checkpoint; skip the evaluation of an incomplete epoch."""
        control.should_save |= self._save_is_due
        self._save_is_due = False
        if self.received is not None and not float(state.epoch or 0).is_integer():
            control.should_evaluate = False
        if self.complete:  # logged, evaluated and saved before the checkpoint
            control.should_log = control.should_evaluate = control.should_save = False
