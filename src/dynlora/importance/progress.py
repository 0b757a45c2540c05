"""Has training made progress that is more than chance? The test before anything moves.

What the adapters have learned since the start, times the gradient of a batch they have not yet
learned from, is to first order the loss that this learning saves there. Where labels say nothing
about inputs it saves as often as it costs; where training learns, it saves nearly always. Signs
are counted, so that neither the learning rate's schedule nor a few large batches decide. The way
from the start is taken, not the last step: near the edge of stability each single step overshoots
along the steepest directions and seems to cost, while the way as a whole saves.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, LoraLayer

SIGNIFICANT = 2.0
"""Standard errors above zero from which progress counts: 2.3 % of pure chance passes."""


class ProgressTest:
    """One-sided sign test of the loss saved by what was learned so far, over all LoRA layers."""

    def __init__(self) -> None:
        self._start: dict[str, tuple[Tensor, Tensor]] = {}
        self._judged = 0
        self._saving = 0

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Judge the way from each layer's start to its present weights by this step's gradient."""
        known = [layer for layer in layers if layer.name in self._start]
        if known:
            start = [weight for layer in known for weight in self._start[layer.name]]
            now = [weight.detach() for layer in known for weight in (layer.lora_A, layer.lora_B)]
            gradients = [g for layer in known for g in (layer.grad_A, layer.grad_B)]
            products = torch._foreach_mul(torch._foreach_sub(start, now), gradients)
            saved = float(torch.stack([product.sum() for product in products]).double().sum())
            self._judged += 1
            self._saving += saved > 0
        for layer in layers:
            if layer.name not in self._start:
                weights = (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
                self._start[layer.name] = weights

    @property
    def z(self) -> float:
        """Batches on which learning saved loss, in standard errors above half; 0 before any."""
        return (2 * self._saving - self._judged) / math.sqrt(max(1, self._judged))

    def is_significant(self) -> bool:
        """Return whether progress exceeds chance."""
        return self.z >= SIGNIFICANT

    def rebase(self, change: BasisChange) -> None:
        """Let a layer whose basis changed start anew; what was counted stays."""
        self._start.pop(change.name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts and the weights at the start."""
        counts = torch.tensor([self._judged, self._saving])
        weights = {
            f"{key}/{name}": weight
            for name, pair in self._start.items()
            for key, weight in zip("AB", pair, strict=True)
        }
        return {"counts": counts, **weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._judged, self._saving = state["counts"].tolist()
        names = [key.removeprefix("A/") for key in state if key.startswith("A/")]
        self._start = {
            name: (state[f"A/{name}"].clone(), state[f"B/{name}"].clone()) for name in names
        }
