"""Gradients of `lora_B` in one observed step beside those of the step before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynlora.types import BasisChange, LoraLayer


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientPairs:
    """One step's gradients and the last ones, layer by layer."""

    names: list[str]
    now: list[Tensor]
    """Of shape ``(out, r)``, in float32 or float64."""
    last: list[Tensor]
    """The last that were finite, of the same shapes; anything where there is nothing to compare."""
    lengths: Tensor
    """Product of both norms, of shape ``(layers,)``; NaN where there is nothing to compare."""


class ConsecutiveGradients:
    """Keeps each layer's last gradient that was finite, for the next step to be compared with."""

    def __init__(self) -> None:
        self._last: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}  # of the last gradients; NaN if none was finite yet

    @torch.no_grad()
    def observe(self, layers: Sequence[LoraLayer]) -> GradientPairs:
        """Return this step's gradients beside the last ones, and keep those that are finite."""
        names = [layer.name for layer in layers]
        finite = [layer.finite for layer in layers]
        now = _wide([layer.grad_B.detach() for layer in layers])
        # A layer without a last gradient is compared with nothing, because the norm is NaN.
        unknown = now[0].new_full((), torch.nan, dtype=torch.float64)
        last = list(map(self._last.get, names, now))
        last_norms = torch.stack([self._norms.get(name, unknown) for name in names])
        norms = torch.where(torch.stack(finite), norms_of(now), unknown)
        kept_norms = torch.where(norms.isnan(), last_norms, norms)
        # Laid out as a checkpoint's are, strides of length 1 included: how a product is summed up
        # depends on it.
        kept = [v.reshape(-1).view(v.shape) for v in map(torch.where, finite, now, last)]
        self._last.update(zip(names, kept, strict=True))
        self._norms.update(zip(names, kept_norms.unbind(), strict=True))
        return GradientPairs(names=names, now=now, last=last, lengths=norms * last_norms)

    def rebase(self, change: BasisChange) -> None:
        """Leave a layer whose basis changed out of the next comparison."""
        self._last.pop(change.name, None)
        self._norms.pop(change.name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return by module name the last gradients that were finite."""
        known = [name for name, norm in self._norms.items() if not norm.isnan()]
        return {name: self._last[name] for name in known}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._last = {name: value.clone() for name, value in state.items()}
        norms = norms_of(list(self._last.values())) if self._last else ()
        self._norms = dict(zip(self._last, norms, strict=True))


def norms_of(tensors: list[Tensor]) -> Tensor:
    """Return the norm of each tensor."""
    return torch.stack(torch._foreach_norm(tensors)).double()


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors of at least float32: products of float16 gradients vanish or overflow."""
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors):
        return tensors  # calls that change nothing would be most of the time on small layers
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
