"""Mean over steps of one number a layer."""

from collections.abc import Iterable, Mapping, Sequence

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

    def add(self, names: Sequence[str], values: Tensor, *, counts: Tensor) -> None:
        """Add the layers' numbers in this step.

        Args:
            names: Module names.
            values: Of shape ``(layers,)``, in float64.
            counts: Boolean, of the same shape: False leaves a layer's mean as it is.
        """
        none = values.new_zeros(2)
        old = torch.stack([self._sums.get(name, none) for name in names])
        new = self._decay * old + torch.stack([values, torch.ones_like(values)], dim=1)
        kept = torch.where(counts[:, None], new, old)
        self._sums.update(zip(names, kept.unbind(), strict=True))

    def means(self, names: Iterable[str]) -> dict[str, float]:
        """Return the means by module name; a layer of which no step counted is left out."""
        seen = [name for name in names if name in self._sums]
        sums = torch.stack([self._sums[name] for name in seen]).tolist() if seen else []
        pairs = zip(seen, sums, strict=True)
        return {name: total / weight for name, (total, weight) in pairs if weight > 0}

    def state_dict(self) -> dict[str, Tensor]:
        """Return both sums per layer."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._sums = {name: sums.clone() for name, sums in state.items()}
