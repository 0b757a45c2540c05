"""One LoRA layer of a saved adapter, and its components, strongest first.

`lora_A` has shape (r, in) for a linear layer, (r, in, height, width) for a convolution and (r,
vocabulary) for an embedding. As matrices, the factors add ``scaling * B @ A`` to a weight.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from dynlora.small_matrices import output_directions

NOISE = 1e-14  # eigenvalues up to this share of the largest are rounding errors in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedLayer:
    """One LoRA layer as saved."""

    name: str  # module name in the base model's `named_modules()`
    key_A: str  # name of `lora_A` in the file
    key_B: str  # name of `lora_B` in the file
    lora_A: Float[Tensor, "r *inputs"]  # shape as in the file
    lora_B: Float[Tensor, "out r *ones"]
    bias: Float[Tensor, " out"] | None = None  # of `lora_B`, times `scaling`; only with `lora_bias`
    lora_alpha: float  # after `alpha_pattern`
    use_rslora: bool  # whether `scaling` divides by the square root of the rank

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.lora_A)

    @property
    def A(self) -> Float[Tensor, "r inputs"]:
        """`lora_A` as a matrix."""
        return self.lora_A.flatten(1)

    @property
    def B(self) -> Float[Tensor, "out r"]:
        """`lora_B` as a matrix."""
        return self.lora_B.flatten(1)

    @property
    def inputs(self) -> int:
        """Columns of the update; for a convolution, channels times kernel size."""
        return self.A.shape[1]

    @property
    def outputs(self) -> int:
        """Rows of the update."""
        return len(self.lora_B)

    @property
    def cost(self) -> int:
        """Parameters per rank."""
        return self.inputs + self.outputs

    @property
    def parameters(self) -> int:
        """Parameters of both factors and the bias."""
        return self.cost * self.r + (0 if self.bias is None else len(self.bias))

    @property
    def scaling(self) -> float:
        """Factor on the product, as in PEFT."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def with_factors(
        self, A: Float[Tensor, "rank inputs"], B: Float[Tensor, "out rank"], *, scaling: float
    ) -> "SavedLayer":
        """Return the layer with other factors of any rank, converted to the layer's dtype."""
        rank = len(A)
        alpha = round(scaling * (math.sqrt(rank) if self.use_rslora else rank), 9)
        return replace(
            self,
            lora_A=A.reshape(rank, *self.lora_A.shape[1:]).to(self.lora_A.dtype),
            lora_B=B.reshape(self.outputs, rank, *self.lora_B.shape[2:]).to(self.lora_B.dtype),
            lora_alpha=alpha,
        )

    def at_rank(self, rank: int) -> "SavedLayer":
        """Return the same update padded with zeros to `rank`, with a scaling of 1.

        `scaling` is folded into `lora_B` and bias. If the folded `lora_B` is not exact in half
        precision, the layer becomes float32.
        """
        exact = self.lora_B.double() * self.scaling
        dtype = self.lora_B.dtype
        if dtype.itemsize < 4 and not torch.equal(exact.to(dtype).double(), exact):
            dtype = torch.float32
        more = (0, rank - self.r)
        return replace(
            self,
            lora_A=pad(self.lora_A.to(dtype), (0, 0) * (self.lora_A.dim() - 1) + more),
            lora_B=pad(exact.to(dtype), (0, 0) * (exact.dim() - 2) + more),
            bias=None if self.bias is None else (self.bias.double() * self.scaling).to(dtype),
            lora_alpha=float(rank),
            use_rslora=False,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Statistics of one layer's inputs and outputs on texts."""

    gram: Float[Tensor, "r r"]  # mean over tokens of (A x)(A x)^T; float64
    output_power: float  # mean squared norm of the layer's output, base and adapter together
    tokens: int


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

        Roy and Vetterli 2007, "The effective rank", EUSIPCO, pp. 606-610.
        """
        parts = [energy / self.energy for energy in self.energies]
        return math.exp(-math.fsum(p * math.log(p) for p in parts if p > 0)) if parts else 0.0

    def kept(self, rank: int) -> float:
        """Return the share of energy in the strongest `rank` components, in ``[0, 1]``."""
        return math.fsum(self.energies[:rank]) / self.energy if self.energies else 1.0

    def cut(self, rank: int) -> SavedLayer:
        """Return the layer with its strongest `rank` components, or all if it has fewer."""
        A, B = self.A[:rank], self.B[:, :rank]
        if not self.energies:  # keep a row of `lora_A`, so that a zero update remains trainable
            A, B = self.layer.A[:1], torch.zeros_like(self.layer.B[:, :1])
        return self.layer.with_factors(A, B, scaling=self.layer.scaling)


@torch.no_grad()
def find_components(layer: SavedLayer, gram: Float[Tensor, "r r"] | None = None) -> Components:
    """Decompose a layer into its components, from r x r matrices.

    `gram` is the mean of ``(A x)(A x)^T`` over observed inputs; None weights all inputs equally, so
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
