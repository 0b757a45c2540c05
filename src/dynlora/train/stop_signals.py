"""End training with a checkpoint after the current step on SIGTERM or Ctrl-C.

Cluster schedulers send SIGTERM before they kill a job. A second signal, or a signal outside
training, stops at once.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynlora.train.signals import stop_at_once

_USUAL: dict[signal.Signals, tuple[Any, ...]] = {
    signal.SIGINT: (signal.default_int_handler,),
    signal.SIGTERM: (signal.SIG_DFL, stop_at_once),
}
"""Default handlers that may be replaced, per signal."""


class StopSignals(TrainerCallback):
    """Ends training after a signal."""

    def __init__(self) -> None:
        """Start without a received signal."""
        self.received: int | None = None
        """Number of the received signal."""
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Replace the default signal handlers inside the block; custom handlers stay."""
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End training with a checkpoint if a signal was received."""
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skip the evaluation of an incomplete epoch."""
        if self.received is not None and not float(state.epoch or 0).is_integer():
            control.should_evaluate = False

    def _receive(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        self._restore()
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
