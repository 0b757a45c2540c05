"""LoRA on `nn.Embedding`: read transposed, because PEFT zeroes the other factor.

`lora_embedding_A` (r, ids) starts at zero and `lora_embedding_B` (dim, r) does not, so that the
first gradients are all in `lora_embedding_A`. Its transpose is our `lora_B` (ids, r), and the
transpose of `lora_embedding_B` our `lora_A` (r, dim). Growing then adds zeros where PEFT does, and
metrics read nonzero gradients. The layer adds ``scaling * lora_A.T @ lora_B[id]`` for an id.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora.adapters.kinds.factor import Factor
from dynlora.adapters.kinds.kind import LayerKind, Rows
from dynlora.errors import LayerError
from dynlora.types import Tokens


def _check(name: str, module: Any) -> None:
    """Check that the lookup neither rescales weights nor returns sparse gradients."""
    base = module.get_base_layer()
    if base.max_norm is not None or base.sparse:
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Embedding with max_norm=None and "
            f"sparse=False, got max_norm={base.max_norm} and sparse={base.sparse}: leave it "
            "out of `target_modules`."
        )


def _factors(module: Any, adapter: str) -> tuple[Factor, Factor]:
    return (
        Factor(module.lora_embedding_B, adapter, 1, _transposed, _transposed),
        Factor(module.lora_embedding_A, adapter, 0, _transposed, _transposed),
    )


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T


def _see(
    module: Any,
    lora_A: Float[Tensor, "r width"],
    lora_B: Float[Tensor, "height r"],
    tokens: Tokens | None,
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
    """Return `lora_A`, and the rows of `lora_B` scaled by the root of their frequency.

    Ids outside the sample must also count. A part ``(ids seen once + 1) / (tokens + 1)`` of the
    frequency is spread evenly over all ids: it estimates how often the next token is an unseen id,
    and is never zero.
    """
    if tokens is None:
        return lora_A.T, lora_B
    ids = len(lora_B)
    counts = torch.bincount(tokens.to(lora_B.device), minlength=ids).to(lora_B)
    unseen = float((counts == 1).sum() + 1) / (len(tokens) + 1)
    shares = (1 - unseen) * counts / len(tokens) + unseen / ids
    scale = module._get_embed_scale()
    factor = 1.0 if scale is None else float(scale)
    return lora_A.T, factor * shares.sqrt()[:, None] * lora_B


def _rows(_module: Any, _adapter: str, inputs: Tensor, output: Tensor) -> Rows:
    """Return the ids."""

    def read(index: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.flatten()[index].long(), output.flatten(0, -2)[index]

    return Rows(shape=tuple(inputs.shape), read=read)


EMBEDDING = LayerKind(check=_check, factors=_factors, see=_see, rows=_rows)
