"""Batched decompositions: small matrices of all layers in, one call per shape.

Launching a small decomposition on a GPU takes longer than computing it, so the number of calls per
event must not grow with the number of layers.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def batched(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Return a function's results per layer, with one call for all layers of equal shapes.

    Args:
        function: Maps stacked arguments to stacked results.
        tensors: One sequence per argument, with one tensor per layer, of any shapes.
    """
    alike: defaultdict[tuple[torch.Size, ...], list[int]] = defaultdict(list)
    rows = list(zip(*tensors, strict=True))
    for place, row in enumerate(rows):
        alike[tuple(tensor.shape for tensor in row)].append(place)
    found: dict[int, tuple[Tensor, ...]] = {}
    for places in alike.values():
        stacks = (torch.stack(column) for column in zip(*(rows[p] for p in places), strict=True))
        found.update(zip(places, zip(*function(*stacks), strict=True), strict=True))
    return [found[place] for place in range(len(rows))]


def smaller_gram(vectors: Float[Tensor, "n width"]) -> Float[Tensor, "k k"]:
    """Return the smaller of a matrix's two Gram matrices, which have equal nonzero eigenvalues.

    Args:
        vectors: If ``n < width``, the result contains their inner products.
    """
    gram: Tensor = vectors @ vectors.T if len(vectors) < vectors.shape[1] else vectors.T @ vectors
    return gram
