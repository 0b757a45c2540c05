"""Small matrices that stand for large ones, and one call for all of one shape.

To start a small decomposition takes a GPU longer than to do it, and it does many at once: what an
event asks for must not grow with the number of layers.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def batched(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Return what a function finds for each layer, from one call for all of equal shapes.

    Args:
        function: From stacks of what layers have to stacks of what it finds.
        tensors: What each layer has, one sequence for each stack; of any shapes.
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
    """Return the smaller of a matrix's two Gram matrices, whose eigenvalues other than 0 are equal.

    Args:
        vectors: If they are fewer than wide, the result is of their inner products.
    """
    gram: Tensor = vectors @ vectors.T if len(vectors) < vectors.shape[1] else vectors.T @ vectors
    return gram
