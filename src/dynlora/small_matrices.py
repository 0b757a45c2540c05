"""Decompositions of small matrices: one call for all layers of a shape.

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

    The function maps stacked arguments to stacked results; `tensors` has one sequence per argument.
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
    """Return the smaller of a matrix's two Gram matrices, which have equal nonzero eigenvalues."""
    gram: Tensor = vectors @ vectors.T if len(vectors) < vectors.shape[1] else vectors.T @ vectors
    return gram


def output_directions(
    R: Float[Tensor, "*layers k r"], moment: Float[Tensor, "*layers r r"]
) -> tuple[Float[Tensor, "*layers k"], Float[Tensor, "*layers k k"]]:
    """Return an adapter's output power per principal direction, and the directions in its basis.

    With ``B = Q R`` and `moment`, the mean of ``(A x)(A x)^T``, they are the eigenvalues and
    eigenvectors ``U`` of ``R moment R^T``, largest first. ``B' = Q U_k`` and ``A' = U_k^T R A`` are
    the best update of rank k in the mean square of the output (Eckart and Young 1936).
    """
    squares, U = torch.linalg.eigh(R @ moment @ R.mT)
    return squares.flip(-1).clamp(min=0), U.flip(-1)
