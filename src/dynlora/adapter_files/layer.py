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

from dynlora.features import effective_rank
from dynlora.small_matrices import output_directions

NOISE = 1e-14  # eigenvalues up to this share of the largest are rounding errors in float64
FAINT = 1e-9  # weight of unseen inputs; it orders the directions that the texts do not use
TINY = 1e-300  # keeps 0 / 0 finite in float64
PIECE = 2048  # columns of a factor to convert to float64 at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedLayer:
    """One LoRA layer as saved."""

    name: str  # module name in the base model's `named_modules()`
    key_A: str  # name of `lora_A` in the file
    key_B: str  # name of `lora_B` in the file
    key_alpha: str | None = None  # name of `lora_alpha` in the file, if it is a tensor there
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

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name in the file."""
        tensors = {self.key_A: self.lora_A, self.key_B: self.lora_B}
        if self.bias is not None:
            tensors[f"{self.key_B.removesuffix('weight')}bias"] = self.bias
        if self.key_alpha is not None:  # in a wider dtype if it is not exact in the factors'
            alpha = float(self.lora_alpha)
            dtypes = (self.lora_A.dtype, torch.float32, torch.float64)
            exact = (torch.tensor(alpha, dtype=dtype) for dtype in dtypes)
            tensors[self.key_alpha] = next(tensor for tensor in exact if tensor.item() == alpha)
        return tensors

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

    def outline(self, rank: int) -> "SavedLayer":
        """Return the layer at another rank and the same scaling, with factors on device `meta`."""
        A = torch.empty(rank, self.inputs, device="meta")
        B = torch.empty(self.outputs, rank, device="meta")
        return self.with_factors(A, B, scaling=self.scaling)

    def grow(self, rank: int, generator: torch.Generator) -> "SavedLayer":
        """Return the same update and scaling at a higher rank, whose new directions can be trained.

        New rows of `lora_A` are random, as PEFT initializes linear layers (Kaiming uniform with
        ``a = sqrt(5)``), and new columns of `lora_B` are zero.
        """
        bound = self.inputs**-0.5
        rows = torch.empty(rank - self.r, self.inputs).uniform_(-bound, bound, generator=generator)
        A = torch.cat([self.A, rows.to(self.A.dtype)])
        return self.with_factors(A, pad(self.B, (0, rank - self.r)), scaling=self.scaling)

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
    to_A: Float[Tensor, "k r"]
    to_B: Float[Tensor, "r k"]
    """Maps from the layer's factors to those of the components, ``to_A @ A`` and ``B @ to_B``."""

    @property
    def A(self) -> Float[Tensor, "k inputs"]:
        """Rows of `lora_A`, one per component."""
        return _mix(self.to_A, self.layer.A, torch.float64)

    @property
    def B(self) -> Float[Tensor, "out k"]:
        """Columns of `lora_B`, with the same norms as the rows of `A`."""
        return _mix(self.to_B.T, self.layer.B.T, torch.float64).T

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
        """Exponential of the entropy of the energy over directions; 0 for a zero update."""
        return effective_rank(self.values.square(), floor=0) if self.energies else 0.0

    def kept(self, rank: int) -> float:
        """Return the share of energy in the strongest `rank` components, in ``[0, 1]``."""
        return math.fsum(self.energies[:rank]) / self.energy if self.energies else 1.0

    def cut(self, rank: int) -> SavedLayer:
        """Return the layer with its strongest `rank` components, or all if it has fewer."""
        layer = self.layer
        A = _mix(self.to_A[:rank], layer.A, layer.lora_A.dtype)
        B = _mix(self.to_B[:, :rank].T, layer.B.T, layer.lora_B.dtype).T
        if not self.energies:  # keep a row of `lora_A`, so that a zero update remains trainable
            A, B = layer.A[:1], torch.zeros_like(layer.B[:, :1])
        return layer.with_factors(A, B, scaling=layer.scaling)


@torch.no_grad()
def find_components(layer: SavedLayer, gram: Float[Tensor, "r r"] | None = None) -> Components:
    """Decompose a layer into its components, from r x r matrices.

    `gram` is the mean of ``(A x)(A x)^T`` over observed inputs; None weights all inputs equally, so
    strengths are the singular values of the update.
    """
    rows, columns = _moment(layer.A), _moment(layer.B.T)
    moment = rows
    if gram is not None:  # a small isotropic part stands for unseen inputs
        moment = gram.double() + FAINT * gram.trace() / rows.trace().clamp(min=TINY) * rows
    # Any R with R^T R = B^T B replaces B; unit columns first, because their norms may differ a lot.
    norms = columns.diagonal().sqrt().clamp(min=TINY)
    squares, V = torch.linalg.eigh(columns / norms / norms[:, None])
    R = squares.clamp(min=0).sqrt()[:, None] * V.T * norms
    squares, U = output_directions(R, moment)
    values = squares.sqrt() * abs(layer.scaling)
    # Drop strengths whose square underflows to 0 in float64.
    some = (squares > NOISE * squares[0]) & (values.square() > 0)
    count = int(some.sum())
    to_A = U[:, :count].T @ R
    to_B = moment @ R.T @ U[:, :count] / squares[:count]
    # Give both factors equal norms, to stay within the range of half precision.
    ratio = (_norms(to_B.T, columns) / _norms(to_A, rows)).sqrt()
    return Components(
        layer=layer, values=values[:count], to_A=to_A * ratio[:, None], to_B=to_B / ratio
    )


def _moment(matrix: Float[Tensor, "r width"]) -> Float[Tensor, "r r"]:
    """Return a factor times its transpose in float64, in pieces to bound memory."""
    total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for piece in torch.split(matrix, PIECE, dim=1):
        wide = piece.double()
        total += wide @ wide.T
    return total


def _norms(rows: Float[Tensor, "k r"], moment: Float[Tensor, "r r"]) -> Float[Tensor, " k"]:
    """Return the norms of ``rows @ M``, given ``M @ M.T``."""
    return (rows @ moment * rows).sum(dim=1).sqrt()


def _mix(
    to: Float[Tensor, "k r"], matrix: Float[Tensor, "r width"], dtype: torch.dtype
) -> Float[Tensor, "k width"]:
    """Return ``to @ matrix``, computed in float64, in pieces to bound memory."""
    pieces = [(to @ piece.double()).to(dtype) for piece in torch.split(matrix, PIECE, dim=1)]
    return torch.cat(pieces, dim=1)
