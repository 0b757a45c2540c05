"""Has training made progress that is more than chance? The test before anything moves.

The weights' latest change, times the gradient of the *next* batch, is to first order the loss that
this change saved on examples it was not computed from. Where labels say nothing about inputs, an
update saves as often as it costs; where training learns, it saves nearly always. The test counts
signs, so that neither the learning rate's schedule nor a few large steps decide it.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynlora.types import BasisChange, LoraLayer

SIGNIFICANT = 2.0
"""Standard errors above zero from which progress counts: 2.3 % of pure chance passes."""


class ProgressTest:
    """One-sided sign test of the loss saved by every second update, over all LoRA layers."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._judged = 0
        self._saving = 0

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> None:
        """Remember the weights, or, if a step was remembered, judge what it changed."""
        if not self._before:
            self._before = {
                layer.name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
                for layer in layers
            }
            return
        known = [layer for layer in layers if layer.name in self._before]
        before = [weight for layer in known for weight in self._before[layer.name]]
        now = [weight.detach() for layer in known for weight in (layer.lora_A, layer.lora_B)]
        gradients = [g for layer in known for g in (layer.grad_A, layer.grad_B)]
        self._before = {}
        if known:
            products = torch._foreach_mul(torch._foreach_sub(before, now), gradients)
            saved = float(torch.stack([product.sum() for product in products]).double().sum())
            self._judged += 1
            self._saving += saved > 0

    @property
    def z(self) -> float:
        """Updates that saved loss, in standard errors above half; 0 before any was judged."""
        return (2 * self._saving - self._judged) / math.sqrt(max(1, self._judged))

    def is_significant(self) -> bool:
        """Return whether progress exceeds chance."""
        return self.z >= SIGNIFICANT

    def rebase(self, change: BasisChange) -> None:
        """Forget the remembered weights of a layer whose basis changed."""
        self._before.pop(change.name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts and the remembered weights."""
        counts = torch.tensor([self._judged, self._saving])
        weights = {
            f"{key}/{name}": weight
            for name, pair in self._before.items()
            for key, weight in zip("AB", pair, strict=True)
        }
        return {"counts": counts, **weights}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._judged, self._saving = state["counts"].tolist()
        names = [key.removeprefix("A/") for key in state if key.startswith("A/")]
        self._before = {
            name: (state[f"A/{name}"].clone(), state[f"B/{name}"].clone()) for name in names
        }
