"""Show training progress: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Sequence
from statistics import median
from typing import Any

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

PLAIN_LINES = 10  # loss lines per run without a terminal


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
        self._tenth = self._noted = 0
        self._loss = self._ranks = ""

    @property
    def _dynamic(self) -> DynamicLora | None:
        return None if self.source is None else self.source.dynamic

    def stop(self) -> None:
        """Stop the live display."""
        self.progress.stop()

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Show the bar."""
        self.progress.update(self.task, total=state.max_steps, completed=state.global_step)
        if self._dynamic is not None:
            self._take_ranks(self._dynamic)  # a resumed run has some events
        self.progress.start()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Advance the bar, and show the ranks."""
        self.progress.update(self.task, completed=state.global_step)
        if self._dynamic is not None and len(self._dynamic.history) > self._noted:
            self._take_ranks(self._dynamic)

    def _take_ranks(self, dynamic: DynamicLora) -> None:
        """Note the ranks, and the agreement at the last event."""
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
        self.stop()
