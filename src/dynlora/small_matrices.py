"""Small matrices that stand for large ones, and one call for all of one shape.

To start a small decomposition takes a GPU longer than to do it, and it does many at once: what an
event asks for must not grow with the number of layers.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor


@overload
def batched(function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor]: ...


@overload
def batched(
    function: Callable[[Tensor], tuple[Tensor, ...]], matrices: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]: ...


def batched(
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    matrices: Sequence[Float[Tensor, "_ _"]],
) -> list[Tensor] | list[tuple[Tensor, ...]]:
    """Return what a function finds for each matrix, from one call for those of each shape.

    Args:
        function: From a stack of matrices to one stack, or to several, of what it finds.
        matrices: Of any shapes.
    """
    alike: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        alike[matrix.shape].append(place)
    found: dict[int, Any] = {}
    for places in alike.values():
        stacks = function(torch.stack([matrices[place] for place in places]))
        parts = stacks.unbind() if isinstance(stacks, Tensor) else zip(*stacks, strict=True)
        found.update(zip(places, parts, strict=True))
    return [found[place] for place in range(len(matrices))]


def smaller_gram(vectors: Float[Tensor, "n width"]) -> Float[Tensor, "k k"]:
    """Return the smaller of a matrix's two Gram matrices, whose eigenvalues other than 0 are equal.

    Args:
        vectors: If they are fewer than wide, the result is of their inner products.
    """
    gram: Tensor = vectors @ vectors.T if len(vectors) < vectors.shape[1] else vectors.T @ vectors
    return gram
