"""Running mean of one number per layer."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class StepMean:
    """Bias-corrected running mean by module name; only `means` synchronizes with the device."""

    def __init__(self, decay: float) -> None:
        """Start without steps.

        Args:
            decay: Weight of the past per step, in ``(0, 1]``; 1 weights all steps equally.
        """
        self._decay = decay
        self._sums: dict[str, Tensor] = {}
        """Weighted sum and sum of weights, by module name."""

    def add(self, names: Sequence[str], values: Tensor, *, counts: Tensor) -> None:
        """Add one step's numbers.

        Args:
            names: Module names.
            values: One number per layer, of shape ``(layers,)``, in float64.
            counts: Boolean of shape ``(layers,)``; False skips a layer.
        """
        none = values.new_zeros(2)
        old = torch.stack([self._sums.get(name, none) for name in names])
        new = self._decay * old + torch.stack([values, torch.ones_like(values)], dim=1)
        kept = torch.where(counts[:, None], new, old)
        self._sums.update(zip(names, kept.unbind(), strict=True))

    def means(self, names: Iterable[str]) -> dict[str, float]:
        """Return the means by module name, without layers that no step counted for."""
        seen = [name for name in names if name in self._sums]
        sums = torch.stack([self._sums[name] for name in seen]).tolist() if seen else []
        pairs = zip(seen, sums, strict=True)
        return {name: total / weight for name, (total, weight) in pairs if weight > 0}

    def state_dict(self) -> dict[str, Tensor]:
        """Return weighted sum and sum of weights per layer."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._sums = {name: sums.clone() for name, sums in state.items()}
