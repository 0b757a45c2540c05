"""LoRA on `nn.Linear`, transformers' `Conv1D` and layers quantised by bitsandbytes.

PEFT's factors have the same shapes on all of them; only the base weight's format differs. A token
is a vector.
"""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dynlora.adapters.kinds.factor import Factor
from dynlora.adapters.kinds.kind import LayerKind, Rows, see_vectors
from dynlora.errors import LayerError


def _check(name: str, module: Any) -> None:
    base = module.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)):
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Linear or a Conv1D, got "
            f"{type(base).__module__}.{type(base).__name__}: leave it out of `target_modules`."
        )


def _factors(module: Any, adapter: str) -> tuple[Factor, Factor]:
    return (
        Factor(module.lora_A[adapter], "weight", 0, _same, _same, "out_features"),
        Factor(module.lora_B[adapter], "weight", 1, _same, _same, "in_features"),
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _rows(_module: Any, _adapter: str, inputs: Tensor, output: Tensor) -> Rows:
    """Return the vectors along the last axis."""

    def read(index: Tensor) -> tuple[Tensor, Tensor]:
        return (
            inputs.flatten(0, -2).index_select(0, index),
            output.flatten(0, -2).index_select(0, index),
        )

    return Rows(shape=tuple(inputs.shape[:-1]), read=read, source=inputs)


LINEAR = LayerKind(check=_check, factors=_factors, see=see_vectors, rows=_rows)
