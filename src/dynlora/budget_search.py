"""`budget_end="auto"`: validation losses of cut adapters in, the smallest sufficient budget out."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from dynlora.distributed import process_count, sum_over_processes
from dynlora.engines.fsdp import reshard
from dynlora.errors import NonFiniteError

RATIO = 2**-0.5
"""Ratio of neighbouring budgets that are tried."""

Validate = Callable[[], float]
"""Returns the mean validation loss of the model as it is."""


class BudgetSearch:
    """Finds the smallest budget that keeps the validation loss within a tolerance.

    The tolerance is a part of the reduction of the loss since the start of the run.
    """

    def __init__(
        self, model: nn.Module, validate: Validate, *, tolerance: float, device: torch.device
    ) -> None:
        """Start without a loss."""
        self._model = model
        self._validate = validate
        self._tolerance = tolerance
        self._device = device
        self.start_loss: float | None = None
        """Validation loss before the first step; None if no step was observed."""
        self.lost: float | None = None
        """Rise of the validation loss by the cut, as a part of its reduction before it; None before
        the cut."""

    def state_dict(self) -> dict[str, float | None]:
        """Return the losses of the run."""
        return {"start_loss": self.start_loss, "lost": self.lost}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Restore the output of `state_dict`."""
        self.start_loss, self.lost = state["start_loss"], state["lost"]

    def loss(self) -> float:
        """Return the validation loss, the mean over processes, without side effects on training.

        Raises:
            NonFiniteError: If it is not finite.
        """
        kind = self._device.type
        devices = [] if kind == "cpu" else [self._device.index or 0]
        forked = torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind)
        with _evaluating(self._model), forked, torch.no_grad():
            own = torch.tensor(float(self._validate()), device=self._device, dtype=torch.float64)
        loss = float(sum_over_processes(own)) / process_count()
        if not math.isfinite(loss):
            raise NonFiniteError(f"`validate` must return a finite loss, got {loss}.")
        return loss

    def smallest(
        self, budgets: Sequence[int], cut_to: Callable[[int], AbstractContextManager[None]]
    ) -> int:
        """Return the smallest sufficient budget, by bisection.

        Args:
            budgets: Falling budgets, of which the first is sufficient.
            cut_to: Cuts the adapter to a budget as long as the context lasts.
        """
        now = self.loss()
        reduction = 0.0 if self.start_loss is None else max(0.0, self.start_loss - now)
        most = now + self._tolerance * reduction
        losses = {budgets[0]: now}

        def exceeds(budget: int) -> bool:
            with cut_to(budget):
                losses[budget] = self.loss()
            return losses[budget] > most

        found = budgets[bisect_left(budgets, True, lo=1, key=exceeds) - 1]
        self.lost = (losses[found] - now) / reduction if reduction else 0.0
        return found


def falling_budgets(highest: int, lowest: int) -> list[int]:
    """Return budgets from `highest` to `lowest`, each by `RATIO` smaller than the one before."""
    budgets = [highest]
    while budgets[-1] > lowest:
        budgets.append(max(lowest, int(budgets[-1] * RATIO)))
    return budgets


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode, and back into their own mode and shards at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        reshard(model)
