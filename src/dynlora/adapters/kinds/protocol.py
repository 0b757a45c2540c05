"""A kind of LoRA layer: where PEFT keeps the two factors, and what the layer's input means.

Every kind is read as ``scaling * lora_B @ lora_A``, where `lora_B` is the factor that starts at
zero: a direction whose column of `lora_B` is zero adds nothing, whatever its row of `lora_A`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from dynlora.adapters.factor import Factor
from dynlora.types import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The tokens of one forward of one layer, not copied before they are read."""

    shape: tuple[int, ...]
    """Their layout, batch first; empty if there is no batch."""
    read: Callable[[Int[Tensor, " n"]], tuple[Tensor, Tensor]]
    """From places in the flattened layout to the inputs and the outputs there."""
    source: Tensor | None = None
    """The tensor that the inputs are copied from as they are: layers that read the same one can
    share copies. None where inputs are made of it, as patches are."""


@runtime_checkable
class LayerKind(Protocol):
    """One kind of layer; stateless, `module` is always PEFT's LoRA layer."""

    def check(self, name: str, module: Any) -> None:
        """Raise `LayerError` if this very layer has a setting that ranks cannot follow."""
        ...

    def factors(self, module: Any, adapter: str) -> tuple[Factor, Factor]:
        """Return `lora_A` and `lora_B`."""
        ...

    def set_shape(self, module: Any, adapter: str, r: int) -> None:
        """Make the fields in which PEFT's submodules keep their shape tell this rank."""
        ...

    def base_norm(self, module: Any) -> float:
        """Return the norm of the base weight, by which white input leaves the layer."""
        ...

    def see(
        self,
        module: Any,
        lora_A: Float[Tensor, "r width"],
        lora_B: Float[Tensor, "height r"],
        tokens: Tokens | None,
    ) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
        """Return what the two factors are on observed tokens, or on white input.

        The mean square norm of ``lora_B @ M @ lora_A`` on the tokens is that of
        ``right @ M @ left.T`` for every ``M``, where left and right are what is returned.
        """
        ...

    def directions(self, tokens: Tokens | None) -> Float[Tensor, "n in_features"] | None:
        """Return what new rows of `lora_A` shall see; None where tokens do not show it."""
        ...

    def rows(self, module: Any, adapter: str, inputs: Tensor, output: Tensor) -> Rows:
        """Return the tokens of one forward."""
        ...
