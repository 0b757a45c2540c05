"""LoRA on `nn.Linear`, on transformers' `Conv1D` and on layers that bitsandbytes quantised.

PEFT's factors are of the same shape for all of them; the base weight alone is held otherwise.
"""

import math
from typing import Any

from jaxtyping import Float
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynlora.adapters.factor import Factor, same
from dynlora.adapters.kinds.protocol import Rows
from dynlora.adapters.sharding import whole
from dynlora.errors import LayerError
from dynlora.types import Tokens


class LinearKind:
    """`lora_A` and `lora_B` as PEFT holds them; a token is a vector."""

    def check(self, name: str, module: Any) -> None:
        """Check that the base is a layer that we know.

        Raises:
            LayerError: If it is not.
        """
        base = module.get_base_layer()
        if not isinstance(base, (nn.Linear, Conv1D)):
            raise LayerError(
                f"LoRA layer {name!r} must be on an nn.Linear or a Conv1D, got "
                f"{type(base).__module__}.{type(base).__name__}: leave it out of `target_modules`."
            )

    def factors(self, module: Any, adapter: str) -> tuple[Factor, Factor]:
        """Return the weights of `lora_A` and `lora_B`."""
        return (
            Factor(module.lora_A[adapter], "weight", 0, same, same),
            Factor(module.lora_B[adapter], "weight", 1, same, same),
        )

    def set_shape(self, module: Any, adapter: str, r: int) -> None:
        """Set the linear layers' features."""
        module.lora_A[adapter].out_features = r
        module.lora_B[adapter].in_features = r

    def base_norm(self, module: Any) -> float:
        """Return the norm of the base weight, of packed weights as the numbers they stand for."""
        return float(whole(dequantize_module_weight(module.get_base_layer())).norm())

    def see(
        self,
        module: Any,
        lora_A: Float[Tensor, "r width"],
        lora_B: Float[Tensor, "height r"],
        tokens: Tokens | None,
    ) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
        """Return what `lora_A` makes of the tokens, and `lora_B`."""
        return project(lora_A, tokens), lora_B

    def directions(self, tokens: Tokens | None) -> Float[Tensor, "n in_features"] | None:
        """Return the tokens: rows of `lora_A` are directions of the input."""
        return tokens

    def rows(self, module: Any, adapter: str, inputs: Tensor, output: Tensor) -> Rows:
        """Return the vectors along the last axis."""

        def read(index: Tensor) -> tuple[Tensor, Tensor]:
            return (
                inputs.flatten(0, -2).index_select(0, index),
                output.flatten(0, -2).index_select(0, index),
            )

        return Rows(shape=tuple(inputs.shape[:-1]), read=read, source=inputs)


def project(lora_A: Float[Tensor, "r width"], tokens: Tokens | None) -> Float[Tensor, "k r"]:
    """Return the tokens in rank space, of which the Gram matrix is a mean; of white input if None.

    Args:
        lora_A: The factor that sees the tokens.
        tokens: Observed vectors.
    """
    if tokens is None:
        return lora_A.T
    return tokens.to(lora_A) @ lora_A.T / math.sqrt(len(tokens))
