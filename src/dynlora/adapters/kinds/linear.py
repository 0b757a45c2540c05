"""LoRA on `nn.Linear`, transformers' `Conv1D` and layers quantised by bitsandbytes.

PEFT's factors have the same shapes on all of them; only the base weight's format differs.
"""

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynlora.adapters.kinds.factor import Factor
from dynlora.adapters.kinds.protocol import Rows
from dynlora.errors import LayerError
from dynlora.types import Tokens


class LinearKind:
    """PEFT's `lora_A` and `lora_B`; a token is a vector."""

    def check(self, name: str, module: Any) -> None:
        """Check that the base layer is an `nn.Linear` or a `Conv1D`.

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
            Factor(module.lora_A[adapter], "weight", 0, _same, _same, "out_features"),
            Factor(module.lora_B[adapter], "weight", 1, _same, _same, "in_features"),
        )

    def see(
        self,
        module: Any,
        lora_A: Float[Tensor, "r width"],
        lora_B: Float[Tensor, "height r"],
        tokens: Tokens | None,
    ) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
        """Return the tokens projected by `lora_A`, and `lora_B`."""
        return project(lora_A, tokens), lora_B

    def rows(self, module: Any, adapter: str, inputs: Tensor, output: Tensor) -> Rows:
        """Return the vectors along the last axis."""

        def read(index: Tensor) -> tuple[Tensor, Tensor]:
            return (
                inputs.flatten(0, -2).index_select(0, index),
                output.flatten(0, -2).index_select(0, index),
            )

        return Rows(shape=tuple(inputs.shape[:-1]), read=read, source=inputs)


def project(lora_A: Float[Tensor, "r width"], tokens: Tokens | None) -> Float[Tensor, "k r"]:
    """Return tokens in rank space, scaled so that their Gram matrix is a mean over tokens.

    Without tokens, the input has unit covariance.
    """
    if tokens is None:
        return lora_A.T
    return tokens.to(lora_A) @ lora_A.T / math.sqrt(len(tokens))


def _same(tensor: Tensor) -> Tensor:
    return tensor
