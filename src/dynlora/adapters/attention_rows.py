"""Queries and keys to attention logits and visible keys, for a few tokens per example.

PyTorch's fused attention never forms the full table of queries and keys. It is recomputed for one
example at a time and at most `QUERIES` of its tokens.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

QUERIES = 256
"""Most tokens per example whose attention is recomputed; they are evenly spaced."""


def attention_rows(
    query: Float[Tensor, "batch heads length d"],
    key: Float[Tensor, "batch key_heads keys d"],
    mask: Tensor | None,
    *,
    causal: bool,
    options: Mapping[str, Any],
) -> Iterator[tuple[Float[Tensor, "heads n keys"], Bool[Tensor, "any_heads n keys"]]]:
    """Yield logits and visible keys per example, for unpadded tokens only.

    A batch without examples yields one empty result, because other processes wait for it.

    Args:
        query: Queries, as transformers' attention functions receive them.
        key: Keys, likewise; nothing is yielded if there are more or fewer keys than queries.
        mask: True or 0 where a key is visible, or a bias; broadcastable to batch, heads, length,
            keys; None hides nothing.
        causal: Whether later keys are hidden without a mask.
        options: The function's other arguments, of which `scaling`, `softcap` and `position_bias`
            are used.
    """
    length = query.shape[2]
    if key.shape[2] != length:
        return
    if len(query) == 0:
        none = query.new_zeros(query.shape[1], 0, length, dtype=torch.float32)
        yield none, none[:1].bool()
    scaling, softcap = options.get("scaling"), options.get("softcap")
    bias = options.get("position_bias")
    for place in range(len(query)):
        keys = key[place].repeat_interleave(query.shape[1] // key.shape[1], dim=0).float()
        visible, added = _split(_of(mask, place), length, causal=causal and mask is None)
        visible, added = visible.to(query.device), added.to(query.device)
        # A token that does not see itself is padding.
        real = visible.diagonal(dim1=-2, dim2=-1).all(dim=0).nonzero().flatten()
        chosen = real[:: -(-len(real) // QUERIES) or 1]
        logits = query[place][:, chosen].float() @ keys.transpose(1, 2)
        logits *= query.shape[-1] ** -0.5 if scaling is None else scaling
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        if bias is not None:
            logits = logits + _of(bias, place)[:, chosen].float()
        yield logits + added[:, chosen], visible[:, chosen]


def _of(tensor: Tensor | None, place: int) -> Any:
    """Return one example's part of a tensor whose batch dimension may be 1."""
    return None if tensor is None else tensor[place if len(tensor) > 1 else 0]


def _split(
    mask: Tensor | None, length: int, *, causal: bool
) -> tuple[Bool[Tensor, "any_heads length keys"], Float[Tensor, "any_heads length keys"]]:
    """Return the visible keys, and the bias on their logits."""
    if mask is None:
        shape = torch.ones(1, length, length, dtype=torch.bool)
        visible = shape.tril() if causal else shape
        return visible, torch.zeros(1, length, length)
    mask = mask[..., :length].expand(-1, length, -1)
    if mask.dtype == torch.bool:
        return mask, torch.zeros_like(mask, dtype=torch.float32)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return ~hidden, mask.masked_fill(hidden, 0.0).float()
