"""What a saved layer is made of: its components, strongest first, and the best cut to a rank.

All of it happens in the r x r space. With ``B = Q R`` and ``G`` the second moment of ``A x``, the
eigenvectors ``U`` of ``R G R^T`` are the layer's principal directions as seen from its output, and
the roots of its eigenvalues their strengths. Keeping the first k, ``B' = Q U_k`` and
``A' = U_k^T R A``, loses the least that any update of rank k can lose (Eckart and Young 1936): in
the Frobenius norm where ``G = A A^T``, in the mean square of the output where inputs were seen.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora.saved.layer import SavedLayer

NOISE = 1e-14
"""Eigenvalues up to this part of the largest are rounding in float64, and count as zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """A layer's update as a sum of directions, strongest first."""

    layer: SavedLayer
    values: Float[Tensor, " k"]
    """Strengths, `scaling` included: singular values of the update, or root mean squares of what a
    direction adds to the output; only those above 0; float64."""
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
        """Directions that the energy is spread over: ``exp`` of its entropy; 0 of no update.

        Reference:
            Roy and Vetterli 2007, "The effective rank", EUSIPCO, pp. 606-610.
        """
        parts = [energy / self.energy for energy in self.energies]
        return math.exp(-math.fsum(p * math.log(p) for p in parts if p > 0)) if parts else 0.0

    def kept(self, rank: int) -> float:
        """Return the part of the energy, in ``[0, 1]``, that the strongest `rank` hold."""
        return math.fsum(self.energies[:rank]) / self.energy if self.energies else 1.0

    def cut(self, rank: int) -> SavedLayer:
        """Return the layer with its strongest `rank` components, or all if it has fewer.

        A layer whose update is zero keeps its first row of `lora_A`, so that it can be trained.
        """
        if not self.energies:
            A, B = self.layer.A[:1], torch.zeros_like(self.layer.B[:, :1])
            return self.layer.with_factors(A, B, scaling=self.layer.scaling)
        return self.layer.with_factors(self.A[:rank], self.B[:, :rank], scaling=self.layer.scaling)


@torch.no_grad()
def find_components(layer: SavedLayer, gram: Float[Tensor, "r r"] | None = None) -> Components:
    """Find a layer's components.

    Args:
        layer: The layer, of rank r.
        gram: Mean of ``(A x)(A x)^T`` over inputs seen; None weighs all inputs alike, for which
            strengths are the singular values of the update.
    """
    A, B = layer.A.double(), layer.B.double()
    moment = A @ A.T if gram is None else gram.double()
    Q, R = torch.linalg.qr(B)
    squares, U = torch.linalg.eigh(R @ moment @ R.T)
    squares, U = squares.flip(0), U.flip(1)
    values = squares.clamp(min=0).sqrt() * abs(layer.scaling)
    # A strength whose square is 0 in float64 has no energy that could be shared out.
    some = (squares > NOISE * squares[0].clamp(min=0)) & (values.square() > 0)
    count = int(some.sum())
    values, U = values[:count], U[:, :count]
    rows, columns = U.T @ R @ A, Q @ U
    # Both factors carry the same norm: neither leaves the range of half precision first.
    roots = rows.norm(dim=1).sqrt()
    return Components(
        layer=layer,
        values=values,
        A=rows / roots[:, None],
        B=columns * roots,
    )
