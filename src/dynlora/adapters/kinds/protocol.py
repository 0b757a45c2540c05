"""A kind of LoRA layer: location of PEFT's two factors, and meaning of the layer's input.

Every kind is read as ``scaling * lora_B @ lora_A``, where `lora_B` is the factor that starts at
zero. A direction with a zero column of `lora_B` adds nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class LayerKind(Protocol):
    """One kind of layer. It is stateless; `module` is always PEFT's LoRA layer."""

    def check(self, name: str, module: Any) -> None:
        """Raise `LayerError` if this layer has a setting that does not permit changes of rank."""
        ...

    def factors(self, module: Any, adapter: str) -> tuple[Factor, Factor]:
        """Return `lora_A` and `lora_B`."""
        ...

    def see(
        self,
        module: Any,
        lora_A: Float[Tensor, "r width"],
        lora_B: Float[Tensor, "height r"],
        tokens: Tokens | None,
    ) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
        """Return both factors applied to observed tokens, or to unit-covariance input.

        For every ``M``, the mean squared norm of ``lora_B @ M @ lora_A`` on the tokens equals the
        squared norm of ``right @ M @ left.T``, where ``(left, right)`` is the result.
        """
        ...

    def rows(self, module: Any, adapter: str, inputs: Tensor, output: Tensor) -> Rows:
        """Return the tokens of one forward."""
        ...
