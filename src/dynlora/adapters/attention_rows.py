"""Queries and keys in, attention logits and visible keys out: a few tokens of each example.

PyTorch's fused attention never holds the full table of queries and keys. To look at it, it is
worked out again, for one example at a time and at most `QUERIES` of its tokens.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

QUERIES = 256
"""Tokens of one example whose attention is looked at; of more, evenly spaced ones."""


def attention_rows(
    query: Float[Tensor, "batch heads length d"],
    key: Float[Tensor, "batch key_heads keys d"],
    mask: Tensor | None,
    *,
    causal: bool,
    options: Mapping[str, Any],
) -> Iterator[tuple[Float[Tensor, "heads n keys"], Bool[Tensor, "any_heads n keys"]]]:
    """Yield each example's logits, and which keys are visible, of tokens that are no padding.

    A batch without examples yields no tokens once: other processes wait for what it shows.

    Args:
        query: As an attention function of transformers gets them.
        key: The same; nothing is yielded where they are not of the same tokens as the queries.
        mask: True or 0 where a key is visible, or a bias; broadcastable to batch, heads, length,
            keys; None hides nothing.
        causal: Whether keys that come later are hidden where there is no mask.
        options: The function's other arguments, of which `scaling`, `softcap` and `position_bias`
            count.
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
        # A token that may not look at itself is padding.
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
    """Return one example's part of a tensor that may be the same for all."""
    return None if tensor is None else tensor[place if len(tensor) > 1 else 0]


def _split(
    mask: Tensor | None, length: int, *, causal: bool
) -> tuple[Bool[Tensor, "any_heads length keys"], Float[Tensor, "any_heads length keys"]]:
    """Return which keys are visible and what is added to their logits."""
    if mask is None:
        shape = torch.ones(1, length, length, dtype=torch.bool)
        visible = shape.tril() if causal else shape
        return visible, torch.zeros(1, length, length)
    mask = mask[..., :length].expand(-1, length, -1)
    if mask.dtype == torch.bool:
        return mask, torch.zeros_like(mask, dtype=torch.float32)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return ~hidden, mask.masked_fill(hidden, 0.0).float()
