"""New rows of `lora_A`: directions of the input that existing rows do not cover."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dynlora.adapters.layers import LoraView
from dynlora.small_matrices import batched, smaller_gram
from dynlora.types import Tokens

MAX_NEW_NORM = 10.0
"""Largest norm of a new row of `lora_A`, relative to existing rows."""

FLOOR = 1e-6
"""Smallest spread of an observed direction, relative to the norm of the centred input."""


@torch.no_grad()
def new_rows(
    layers: Sequence[LoraView],
    counts: Sequence[int],
    tokens: Sequence[Tokens | None],
    *,
    generator: Generator,
) -> list[Float[Tensor, "_ _"]]:
    """Return new rows of `lora_A`: principal directions of the input that old rows do not cover.

    Directions are random where the tokens show too few. A new row's mean squared input equals the
    mean over existing rows, so that its column of `lora_B` gets gradients of the usual size. Its
    norm is at most `MAX_NEW_NORM` times theirs: directions of little variance would need more.

    Args:
        layers: The layers to grow.
        counts: Number of new rows per layer.
        tokens: Observed inputs per layer. None, or ids, which show no directions, use random ones.
        generator: Generator of random directions.
    """
    held = [layer.lora_A.double() for layer in layers]
    seen = [None if t is None or not t.is_floating_point() else t for t in tokens]
    shown = _uncovered_directions(held, seen, counts)
    return [
        _scaled(A, _filled_up(rows, count, generator), inputs)
        for A, rows, count, inputs in zip(held, shown, counts, seen, strict=True)
    ]


def _uncovered_directions(
    held: Sequence[Tensor], seen: Sequence[Tensor | None], counts: Sequence[int]
) -> list[Tensor]:
    """Return at most `count` unit directions per layer that its rows do not cover."""
    covered = batched(torch.linalg.qr, [A.T for A in held])
    places, residuals, floors = [], [], []
    for place, (A, (Q, _), inputs) in enumerate(zip(held, covered, seen, strict=True)):
        if inputs is not None:
            centred = (inputs - inputs.mean(dim=0)).to(A)
            places.append(place)
            residuals.append(centred - centred @ Q @ Q.T)
            floors.append(FLOOR * centred.norm())
    wanted = [counts[place] for place in places]
    found = dict(zip(places, principal_directions(residuals, wanted, floors=floors), strict=True))
    return [found.get(place, A[:0]) for place, A in enumerate(held)]


def principal_directions(
    inputs: Sequence[Float[Tensor, "_ _"]],
    counts: Sequence[int],
    *,
    floors: Sequence[Float[Tensor, ""]],
) -> list[Float[Tensor, "_ _"]]:
    """Return the unit directions of each input's largest spread, at most `count` above `floor`.

    The smaller Gram matrix costs a third of an SVD, and in float64 resolves spreads down to 1e-7 of
    the largest. The largest element of each direction is positive. A floor is the smallest root of
    a direction's sum of squares.
    """
    if not inputs:
        return []
    spreads, bases = [], []
    spectra = batched(torch.linalg.eigh, [smaller_gram(vectors) for vectors in inputs])
    for (squares, vectors), count in zip(spectra, counts, strict=True):
        spreads.append(squares.flip(0)[:count].clamp(min=0).sqrt())
        bases.append(vectors.flip(1)[:, :count].T)
    enough = [(s > floor).sum() for s, floor in zip(spreads, floors, strict=True)]
    found = []
    for vectors, spread, basis, k in zip(
        inputs, spreads, bases, torch.stack(enough).tolist(), strict=True
    ):
        wide = len(vectors) < vectors.shape[1]
        rows = basis[:k] @ vectors / spread[:k, None] if wide else basis[:k]
        found.append(rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign())
    return found


def _filled_up(rows: Tensor, count: int, generator: Generator) -> Tensor:
    """Return `count` unit directions: the given rows, then random ones."""
    shape = count - len(rows), rows.shape[1]
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(rows)
    return torch.cat([rows, noise / noise.norm(dim=1, keepdim=True)])


def _scaled(A: Tensor, rows: Tensor, inputs: Tensor | None) -> Tensor:
    usual, own = _input_power(A, inputs).mean(), _input_power(rows, inputs)
    norm = A.square().sum(dim=1).mean().sqrt()
    lengths = torch.where(own > 0, (usual / own).sqrt(), norm).clamp(max=MAX_NEW_NORM * norm)
    return rows * lengths[:, None]


def _input_power(rows: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the mean squared input along each row; on unit-covariance input without tokens."""
    if tokens is None:
        return rows.square().sum(dim=1)
    return (tokens.to(rows) @ rows.T).square().mean(dim=0)
