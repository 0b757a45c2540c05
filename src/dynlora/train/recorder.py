"""Record a run during training: metrics, rank events, seconds, and the seals of checkpoints."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora import DynamicLora, DynamicLoraCallback
from dynlora.files.json_files import append_line, write_lines
from dynlora.runs.checkpoints import delete_old, seal
from dynlora.runs.folder import RunFolder
from dynlora.runs.lines import metrics_until
from dynlora.runs.resume import Past
from dynlora.train.machine import peak_memory


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
