"""Decompose a saved layer into components, strongest first, and cut it to a lower rank.

All computations use r x r matrices (see `small_matrices.output_directions`).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora.adapter_files.layer import SavedLayer
from dynlora.small_matrices import output_directions

NOISE = 1e-14
"""Eigenvalues up to this share of the largest are rounding errors in float64 and count as zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Statistics of one layer's inputs and outputs on texts."""

    gram: Float[Tensor, "r r"]
    """Mean over tokens of ``(A x)(A x)^T``; float64."""
    output_power: float
    """Mean squared norm of the layer's output, base and adapter together."""
    tokens: int
    """Number of tokens; for a convolution, of positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """A layer's update as a sum of directions, strongest first."""

    layer: SavedLayer
    values: Float[Tensor, " k"]
    """Strengths above 0, including `scaling`, in float64: singular values of the update, or root
    mean squares of each direction's part in the output."""
    A: Float[Tensor, "k inputs"]
    B: Float[Tensor, "out k"]

    @property
    def energies(self) -> list[float]:
        """Squares of the strengths."""
        return [float(value) for value in self.values.square()]

    @property
    def energy(self) -> float:
        """Sum of the squares."""
        return math.fsum(self.energies)

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the energy over directions; 0 for a zero update.

        Reference:
            Roy and Vetterli 2007, "The effective rank", EUSIPCO, pp. 606-610.
        """
        parts = [energy / self.energy for energy in self.energies]
        return math.exp(-math.fsum(p * math.log(p) for p in parts if p > 0)) if parts else 0.0

    def kept(self, rank: int) -> float:
        """Return the share of energy in the strongest `rank` components, in ``[0, 1]``."""
        return math.fsum(self.energies[:rank]) / self.energy if self.energies else 1.0

    def cut(self, rank: int) -> SavedLayer:
        """Return the layer with its strongest `rank` components, or all if it has fewer.

        A layer with a zero update keeps the first row of `lora_A`, so that it remains trainable.
        """
        A, B = self.A[:rank], self.B[:, :rank]
        if not self.energies:
            A, B = self.layer.A[:1], torch.zeros_like(self.layer.B[:, :1])
        return self.layer.with_factors(A, B, scaling=self.layer.scaling)


@torch.no_grad()
def find_components(layer: SavedLayer, gram: Float[Tensor, "r r"] | None = None) -> Components:
    """Decompose a layer into its components.

    Args:
        layer: The layer, of rank r.
        gram: Mean of ``(A x)(A x)^T`` over observed inputs; None weights all inputs equally, so
            strengths are the singular values of the update.
    """
    A, B = layer.A.double(), layer.B.double()
    moment = A @ A.T if gram is None else gram.double()
    Q, R = torch.linalg.qr(B)
    squares, U = output_directions(R, moment)
    values = squares.sqrt() * abs(layer.scaling)
    # Drop strengths whose square underflows to 0 in float64.
    some = (squares > NOISE * squares[0]) & (values.square() > 0)
    count = int(some.sum())
    rows, columns = U[:, :count].T @ R @ A, Q @ U[:, :count]
    # Give both factors equal norms, to stay within the range of half precision.
    roots = rows.norm(dim=1).sqrt()
    return Components(
        layer=layer, values=values[:count], A=rows / roots[:, None], B=columns * roots
    )
