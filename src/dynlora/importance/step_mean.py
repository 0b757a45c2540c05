"""Mean over steps of one number a layer, shared by the metrics that score by one."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class StepMean:
    """Weighted mean by module name, free of start-up bias; read back only when it is asked for."""

    def __init__(self, decay: float) -> None:
        """Begin without any step.

        Args:
            decay: Weight of the past in one step, in ``(0, 1]``; with 1 all steps count alike.
        """
        self._decay = decay
        self._sums: dict[str, Tensor] = {}
        """Weighted sum and sum of weights, by module name."""

    def add(self, name: str, value: Tensor, *, counts: Tensor) -> None:
        """Add a layer's number in this step.

        Args:
            name: Module name.
            value: Of shape ``()``, in float64.
            counts: Boolean of shape ``()``: False leaves the mean as it is.
        """
        old = self._sums.get(name, value.new_zeros(2))
        new = self._decay * old + torch.stack([value, torch.ones_like(value)])
        self._sums[name] = torch.where(counts, new, old)

    def means(self, names: Iterable[str]) -> dict[str, float]:
        """Return the means by module name; a layer of which no step counted is left out."""
        sums = {name: self._sums[name].tolist() for name in names if name in self._sums}
        return {name: total / weight for name, (total, weight) in sums.items() if weight > 0}

    def state_dict(self) -> dict[str, Tensor]:
        """Return both sums per layer."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._sums = {name: sums.clone() for name, sums in state.items()}
