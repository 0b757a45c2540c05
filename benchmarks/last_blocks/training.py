"""One training loop for all arms of the screen and of the comparison that follows it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from transformers import get_linear_schedule_with_warmup

from benchmarks.last_blocks.frozen_trunk import (
    CachedExamples,
    Judged,
    SplitModel,
    evaluate,
    loss_of,
)
from benchmarks.last_blocks.tasks import TaskConfig
from benchmarks.recovery.arms import MAX_GRAD_NORM, WARMUP
from benchmarks.recovery.batches import training_batches
from dynlora.history import Event


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task with the trunk's outputs."""

    config: TaskConfig
    model: SplitModel
    parts: Mapping[str, CachedExamples]
    head: Tensor
    """Output weights of the task's labels at the start; trained if they require gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Values that all arms share in one run."""

    task: LoadedTask
    kind: str
    """`trial` or `final`."""
    learning_rate: float
    scale: float
    """Factor of each layer's adapter."""
    seed: int

    @property
    def data(self) -> CachedExamples:
        """Examples to train on."""
        return self.task.parts[f"{self.kind}_train"]

    @property
    def judge(self) -> CachedExamples:
        """Examples that measure the loss of the run."""
        return self.task.parts[f"{self.kind}_judge"]

    @property
    def validation(self) -> CachedExamples:
        """Examples that a method may see; facts have no other split than the judge's."""
        return self.judge if self.task.config.kind == "facts" else self.task.parts["trial_judge"]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.task.config.epochs * -(-len(self.data.lengths) // self.task.config.batch)

    def batches(self) -> Iterator[list[int]]:
        """Yield the rows of each step; the first half has none of a class that comes late."""
        rows, steps = torch.arange(len(self.data.lengths)), self.steps
        if self.task.config.late is not None:
            classes = torch.tensor([labels[-1] for labels in self.data.examples.labels])
            early = rows[classes != self.task.config.late]
            yield from self._drawn(early, steps // 2, self.seed)
            steps -= steps // 2
        yield from self._drawn(rows, steps, self.seed)

    def _drawn(self, rows: Tensor, steps: int, seed: int) -> Iterator[list[int]]:
        lengths, size = self.data.lengths[rows], self.task.config.batch
        for batch in training_batches(lengths, size=size, seed=seed, steps=steps):
            yield rows[batch].tolist()


class Controller(Protocol):
    """The part of `DynamicLora` that the loop needs."""

    @property
    def ranks(self) -> dict[str, int]:
        """Live rank by layer."""

    @property
    def parameters(self) -> int:
        """Live parameters."""

    @property
    def peak_parameters(self) -> int:
        """Highest number of live parameters so far."""

    @property
    def history(self) -> Sequence[Event]:
        """Events at which ranks could move."""

    def observe(self) -> None:
        """Read the gradients before the optimizer's step."""

    def step(self) -> None:
        """Change ranks after the optimizer's step."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A model with an untrained adapter."""

    model: nn.Module
    control: Callable[[Optimizer, Callable[[], float]], Controller]
    """Returns the controller, from the optimizer and a function that returns the validation loss.
    """
    penalty: Callable[[], Tensor | float] = float
    """Returns a term to add to the loss of each batch."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The end of a run."""

    model: nn.Module
    controller: Controller
    judged: Judged
    """By the run's judge."""


def train(adapter: Adapter, run: Run) -> Trained:
    """Train an adapter and judge it."""
    model = adapter.model.train()
    head = run.task.head.detach().clone().requires_grad_(run.task.head.requires_grad)
    trained = [p for p in (*model.parameters(), head) if p.requires_grad]
    optimizer = AdamW(trained, lr=run.learning_rate, weight_decay=0.0)
    rates = get_linear_schedule_with_warmup(optimizer, round(WARMUP * run.steps), run.steps)
    controller = adapter.control(optimizer, lambda: evaluate(model, run.validation, head).loss)
    for rows in run.batches():
        (loss_of(model, run.data, rows, head) + adapter.penalty()).backward()
        clip_grad_norm_(trained, MAX_GRAD_NORM)
        controller.observe()
        optimizer.step()
        controller.step()
        rates.step()
        optimizer.zero_grad()
    return Trained(model, controller, evaluate(model, run.judge, head))
