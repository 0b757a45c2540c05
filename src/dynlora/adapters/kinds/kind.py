"""A kind of LoRA layer: location of PEFT's two factors, and meaning of the layer's input.

Every kind is read as ``scaling * lora_B @ lora_A``, where `lora_B` is the factor that starts at
zero. A direction with a zero column of `lora_B` adds nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from dynlora.adapters.kinds.factor import Factor
from dynlora.types import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Tokens of one forward of one layer, copied only when read."""

    shape: tuple[int, ...]
    """Layout, batch first; empty without a batch."""
    read: Callable[[Int[Tensor, " n"]], tuple[Tensor, Tensor]]
    """Function from indices in the flattened layout to inputs and outputs."""
    source: Tensor | None = None
    """Tensor from which inputs are copied unchanged, so that layers with the same source can share
    copies. None if inputs are derived from it, as patches are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Functions on one kind of PEFT's LoRA layers."""

    check: Callable[[str, Any], None]
    """Raises `LayerError` if a setting does not permit changes of rank; from name, layer."""
    factors: Callable[[Any, str], tuple[Factor, Factor]]
    """Returns `lora_A` and `lora_B`; from layer, adapter."""
    see: Callable[[Any, Tensor, Tensor, Tokens | None], tuple[Tensor, Tensor]]
    """Returns both factors applied to observed tokens, or to unit-covariance input.

    For every ``M``, the mean squared norm of ``lora_B @ M @ lora_A`` on the tokens equals the
    squared norm of ``right @ M @ left.T``, where ``(left, right)`` of shapes ``(k, r)`` and
    ``(l, r)`` is the result; from layer, `lora_A`, `lora_B`, tokens.
    """
    rows: Callable[[Any, str, Tensor, Tensor], Rows]
    """Returns the tokens of one forward; from layer, adapter, input, output."""


def see_vectors(
    _module: Any,
    lora_A: Float[Tensor, "r width"],
    lora_B: Float[Tensor, "height r"],
    tokens: Tokens | None,
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
    """Return the tokens projected by `lora_A`, whose Gram matrix is a mean over them, and `lora_B`.

    This is `LayerKind.see` of layers whose tokens are vectors.
    """
    if tokens is None:
        return lora_A.T, lora_B
    return tokens.to(lora_A) @ lora_A.T / math.sqrt(len(tokens)), lora_B
