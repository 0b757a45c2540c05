"""How much each component of a LoRA layer adds to its output, on real input.

Everything happens in the r x r space. With ``B = Q R`` and the Gram matrix ``C`` of ``A x`` over
the observed tokens, the eigenvectors ``U`` of ``R C R^T`` are, seen from the output, the adapter's
principal directions on real input, and the roots of its eigenvalues their strengths. Keeping the
first k of them, ``B' = Q U_k``, ``A' = U_k^T R A``, is the best rank-k change of the output in the
mean square: no other adapter of that rank is closer on those tokens. The full matrix ``B A`` is
never formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynlora.adapters.layers import LoraView
from dynlora.small_matrices import batched
from dynlora.types import Tokens

NOTHING = 1e-14
"""Part of the strongest component's square below which another adds nothing: its root is what
float32 weights resolve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strengths:
    """A LoRA layer's components, strongest first, and the maps to and from them."""

    values: Float[Tensor, " r"]
    """Root mean square over the tokens of each component's output norm, scaling included; the
    trailing zeros are directions that were grown and not yet trained."""
    to_A: Float[Tensor, "r r"]
    to_B: Float[Tensor, "r r"]
    trained: list[int]
    """Directions whose column of `lora_B` is not all zeros."""

    def lost(self, rank: int) -> Float[Tensor, ""]:
        """Return the root mean square norm of what keeping `rank` components drops."""
        return self.values[rank:].square().sum().sqrt()


@torch.no_grad()
def measure_strengths(
    layers: Sequence[LoraView], tokens: Sequence[Tokens | None]
) -> list[Strengths]:
    """Find each layer's components on the observed tokens.

    Directions of zero strength (columns of `lora_B` that are all zero) come last, as they are:
    refactoring them would turn their `lora_A` rows into zeros, which never train again.

    Args:
        layers: The layers.
        tokens: Observed inputs of each; None takes white input, for which strengths are singular
            values.
    """
    trained = _trained_directions(layers)
    seen = [layer.see(shown) for layer, shown in zip(layers, tokens, strict=True)]
    Rs, grams = _output_grams(
        [left[:, used] for (left, _), used in zip(seen, trained, strict=True)],
        [right[:, used] for (_, right), used in zip(seen, trained, strict=True)],
    )
    spectra = batched(torch.linalg.eigh, grams)
    inverses = batched(partial(torch.linalg.pinv, rtol=1e-10), Rs)
    return [
        _strengths(layer, used, R=R, inverse=inverse, squares=squares, U=U)
        for layer, used, R, inverse, (squares, U) in zip(
            layers, trained, Rs, inverses, spectra, strict=True
        )
    ]


def _trained_directions(layers: Sequence[LoraView]) -> list[list[int]]:
    used = torch.cat([layer.lora_B.any(dim=0) for layer in layers])
    flags = iter(used.tolist())  # asked for once: on a GPU each question waits for its answer
    return [[k for k in range(layer.r) if next(flags)] for layer in layers]


def _strengths(
    layer: LoraView, trained: list[int], *, R: Tensor, inverse: Tensor, squares: Tensor, U: Tensor
) -> Strengths:
    """Return a layer's components from what was found of its trained directions."""
    A = layer.lora_A.double()
    rank, active = len(A), len(trained)
    fresh = [k for k in range(rank) if k not in trained]
    order = torch.tensor(trained + fresh, device=A.device)
    squares, U = squares.flip(0).clamp(min=0), U.flip(1)
    to_A = U.T @ R
    rows = to_A @ A[order[:active]]
    # Rows of A keep their usual norm and B carries the strength, as in a freshly made adapter.
    usual = A.norm(dim=1).square().mean().sqrt()
    norms = rows.norm(dim=1)
    balance = torch.where(norms > 0, norms / usual, 1.0)
    count = len(squares)  # fewer than the trained ones where they outnumber the outputs
    values = A.new_zeros(rank)
    values[:count] = squares.sqrt() * abs(layer.scaling)
    # In this order of directions. Those beyond the outputs add no strength; as of untrained ones,
    # their rows must not die.
    basis_A, basis_B = A.new_zeros(rank, rank), A.new_zeros(rank, rank)
    basis_A[:count, :active] = to_A / balance[:, None]
    basis_A.diagonal()[count:] = 1
    basis_B[:active, :count] = inverse @ U * balance
    basis_B.diagonal()[active:] = 1
    back = order.argsort()
    return Strengths(values=values, to_A=basis_A[:, back], to_B=basis_B[back], trained=trained)


def _output_grams(
    lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``R`` of each ``right = Q R``, and the Gram matrix of the output seen from ``Q``."""
    Rs = batched(_triangles, rights)
    return Rs, [R @ (left.T @ left) @ R.T for left, R in zip(lefts, Rs, strict=True)]


def _triangles(matrices: Float[Tensor, "layers out r"]) -> Float[Tensor, "layers _ r"]:
    R: Tensor = torch.linalg.qr(matrices, mode="r").R
    return R


@torch.no_grad()
def component_powers(
    layers: Sequence[LoraView], tokens: Sequence[Tokens | None]
) -> list[Float[Tensor, " _"]]:
    """Return the squares of each layer's strengths alone, weakest first (see `measure_strengths`).

    Args:
        layers: The layers.
        tokens: Observed inputs of each; None takes white input.
    """
    seen = [layer.see(shown) for layer, shown in zip(layers, tokens, strict=True)]
    _, grams = _output_grams([left for left, _ in seen], [right for _, right in seen])
    # What rounding leaves of a direction that adds nothing would count as something.
    return [
        torch.where(powers > NOTHING * powers[-1], powers, 0) * layer.scaling**2
        for layer, powers in zip(layers, batched(torch.linalg.eigvalsh, grams), strict=True)
    ]


def lowest_ranks(
    powers: Sequence[Float[Tensor, " _"]], tolerated: Float[Tensor, " layers"]
) -> list[int]:
    """Return how many of each layer's components must stay so that not too much is lost.

    Args:
        powers: Squares of each layer's strengths, weakest first.
        tolerated: Root mean square norm that each layer may lose.
    """
    # The strongest stays in any case: it is left out before shorter rows are filled up with 0.
    weaker = pad_sequence([p[:-1] for p in powers], batch_first=True, padding_side="left")
    too_much = weaker.cumsum(dim=1).sqrt() > tolerated[:, None]
    found: list[int] = (1 + too_much.sum(dim=1)).tolist()
    return found
