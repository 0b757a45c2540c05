"""Change of rank: grow without changing the function, shrink losing the least, reorder.

Everything happens in the r x r space. With ``B = Q R`` and the Gram matrix ``C`` of ``A x`` over
the observed tokens, the eigenvectors ``U`` of ``R C R^T`` are, seen from the output, the adapter's
principal directions on real input, and the roots of its eigenvalues their strengths. Keeping the
first k of them, ``B' = Q U_k``, ``A' = U_k^T R A``, is the best rank-k change of the output in the
mean square: no other adapter of that rank is closer on those tokens. The full matrix ``B A`` is
never formed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import pad_sequence

from dynlora.adapters.deepspeed import AnyOptimizer
from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView
from dynlora.adapters.optimizer_state import rebase_state
from dynlora.adapters.sharding import overwrite, shape_of
from dynlora.types import BasisChange, Tokens

MAX_NEW_NORM = 10.0
"""Longest a new row of `lora_A` may be, in norms of the rows held."""

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

    def lost(self, rank: int) -> float:
        """Return the root mean square norm of what keeping `rank` components drops."""
        return float(self.values[rank:].square().sum().sqrt())

    def relative_to(self, norm: float) -> "Strengths":
        """Return the same components with their strengths divided by a norm, if that is not 0."""
        return replace(self, values=self.values / norm) if norm > 0 else self


@torch.no_grad()
def measure_strengths(layer: LoraView, tokens: Tokens | None) -> Strengths:
    """Find a layer's components on the observed tokens.

    Directions of zero strength (columns of `lora_B` that are all zero) come last, as they are:
    refactoring them would turn their `lora_A` rows into zeros, which never train again.

    Args:
        layer: The layer, of rank r.
        tokens: Observed inputs; None takes white input, for which strengths are singular values.
    """
    A, B = layer.lora_A.double(), layer.lora_B.double()
    used = B.any(dim=0)
    active, fresh = used.nonzero().flatten(), (~used).nonzero().flatten()
    left, right = layer.see(tokens)
    R, gram = _output_gram(left[:, active], right[:, active])
    squares, U = torch.linalg.eigh(gram)
    squares, U = squares.flip(0).clamp(min=0), U.flip(1)
    to_A = U.T @ R
    rows = to_A @ A[active]
    # Rows of A keep their usual norm and B carries the strength, as in a freshly made adapter.
    usual = A.norm(dim=1).square().mean().sqrt()
    norms = rows.norm(dim=1)
    balance = torch.where(norms > 0, norms / usual, 1.0)
    values = A.new_zeros(len(A))
    basis_A = A.new_zeros(len(A), len(A))
    basis_B = A.new_zeros(len(A), len(A))
    count = len(squares)  # fewer than the active columns where they outnumber the outputs
    values[:count] = squares.sqrt() * abs(layer.scaling)
    basis_A[:count, active] = to_A / balance[:, None]
    basis_B[active, :count] = torch.linalg.pinv(R, rtol=1e-10) @ U * balance
    # Columns beyond the outputs add no strength; as with untrained ones, their rows must not die.
    basis_A[range(count, len(active)), active[count:]] = 1
    last = range(len(active), len(A))
    basis_A[last, fresh] = 1
    basis_B[fresh, last] = 1
    return Strengths(values=values, to_A=basis_A, to_B=basis_B)


def _output_gram(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``R`` of ``right = Q R``, and the Gram matrix of the output seen from ``Q``."""
    R = torch.linalg.qr(right, mode="r").R
    return R, R @ (left.T @ left) @ R.T


@torch.no_grad()
def component_powers(layer: LoraView, tokens: Tokens | None) -> Float[Tensor, " r"]:
    """Return the squares of a layer's strengths alone, weakest first (see `measure_strengths`)."""
    left, right = layer.see(tokens)
    _, gram = _output_gram(left, right)
    powers: Tensor = torch.linalg.eigvalsh(gram)
    # What rounding leaves of a direction that adds nothing would count as something.
    return torch.where(powers > NOTHING * powers[-1], powers, 0) * layer.scaling**2


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


def shrink_change(layer: LoraView, strengths: Strengths, rank: int) -> BasisChange:
    """Return the change that keeps the `rank` strongest components, closest to no change.

    Where only untrained directions go, those kept stay bit for bit as they are.
    """
    kept = layer.lora_B.any(dim=0).nonzero().flatten()
    if rank < len(kept):
        projector = strengths.to_B[:, :rank] @ strengths.to_A[:rank]
        to_A, to_B = split_projector(projector, rank)
        return BasisChange(name=layer.name, to_A=to_A, to_B=to_B)
    fresh = (~layer.lora_B.any(dim=0)).nonzero().flatten()
    kept = torch.cat([kept, fresh[: rank - len(kept)]]).sort().values
    eye = torch.eye(layer.r, dtype=torch.float64, device=kept.device)
    return BasisChange(name=layer.name, to_A=eye[kept], to_B=eye[:, kept])


def split_projector(
    projector: Float[Tensor, "r r"], rank: int
) -> tuple[Float[Tensor, "rank r"], Float[Tensor, "r rank"]]:
    """Split a projector of that rank into ``to_B @ to_A``, both as close to a selection as can be.

    The product fixes the factors up to an invertible matrix. The balanced split, ``sqrt(S) V^T``
    and ``U sqrt(S)`` of its SVD, is a pure rotation wherever the projector is orthogonal, so that
    gradients, steps and moments in the kept space stay what they were. The rotation left free
    brings the kept rows closest to the old rows that take most part in them, because Adam's
    moments belong to single rows.
    """
    U, S, Vh = torch.linalg.svd(projector)
    roots = S[:rank].sqrt()
    to_A, to_B = roots[:, None] * Vh[:rank], U[:, :rank] * roots
    nearest = to_A.norm(dim=0).topk(rank).indices.sort().values
    left, _, right = torch.linalg.svd(to_A[:, nearest])
    rotation = left @ right
    return rotation.T @ to_A, to_B @ rotation


def reorder_change(layer: LoraView, strengths: Strengths) -> BasisChange:
    """Return the change that orders a layer's components by strength, dropping none."""
    return BasisChange(name=layer.name, to_A=strengths.to_A, to_B=strengths.to_B)


def grow_change(layer: LoraView, rank: int) -> BasisChange:
    """Return the change that keeps every direction and adds ``rank - r`` empty ones."""
    eye = torch.eye(rank, layer.r, dtype=torch.float64, device=layer.lora_A.device)
    return BasisChange(name=layer.name, to_A=eye, to_B=eye.T)


def scale_change(layer: LoraView, ratio: float) -> BasisChange:
    """Return the change that multiplies `scaling` by `ratio` and divides `lora_B` by it."""
    eye = torch.eye(layer.r, dtype=torch.float64, device=layer.lora_A.device)
    return BasisChange(name=layer.name, to_A=eye, to_B=eye / ratio, scale_ratio=ratio)


@torch.no_grad()
def new_rows(
    layer: LoraView,
    count: int,
    *,
    tokens: Tokens | None,
    generator: Generator,
) -> Float[Tensor, "count in_features"]:
    """Return directions for `count` new rows of `lora_A`, which see as much input as those held.

    They are the input's directions of largest variance that the rows held do not cover, as EVA
    takes them before training; where the tokens show too few, random ones. Each is scaled so that
    the mean square of the input along it is the mean over the rows held: its column of `lora_B`
    then gets gradients of the usual size and learns at the usual pace. Where the input hardly
    varies that would take rows of any length; they end at `MAX_NEW_NORM` times the usual norm.
    """
    A = layer.lora_A.double()
    covered = torch.linalg.qr(A.T).Q
    rows = A.new_zeros(0, A.shape[1])
    seen = layer.directions(tokens)
    if seen is not None:
        centred = (seen - seen.mean(dim=0)).to(A)
        residual = centred - centred @ covered @ covered.T
        rows = principal_directions(residual, count, floor=1e-6 * float(centred.norm()))
        # Eigenvectors have either sign, by rounding: the largest element is made positive.
        rows = rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    missing = count - len(rows)
    noise = torch.randn(missing, A.shape[1], generator=generator, dtype=torch.float64).to(A)
    rows = torch.cat([rows, noise / noise.norm(dim=1, keepdim=True)])
    usual, own = _input_power(A, seen).mean(), _input_power(rows, seen)
    norm = A.square().sum(dim=1).mean().sqrt()
    lengths = torch.where(own > 0, (usual / own).sqrt(), norm).clamp(max=MAX_NEW_NORM * norm)
    return rows * lengths[:, None]


def principal_directions(
    tokens: Float[Tensor, "n in_features"], count: int, *, floor: float
) -> Float[Tensor, "k in_features"]:
    """Return the unit directions of largest spread, at most `count`, all above `floor`.

    From the smaller of the two Gram matrices, which costs a third of an SVD: in float64 it still
    tells a spread of 1e-7 of the largest one.

    Args:
        tokens: Vectors, already without what shall not count.
        count: Most directions wanted.
        floor: Least root of a direction's sum of squares.
    """
    wide = len(tokens) < tokens.shape[1]
    gram = tokens @ tokens.T if wide else tokens.T @ tokens
    squares, vectors = torch.linalg.eigh(gram)
    spread = squares.flip(0)[:count].clamp(min=0).sqrt()
    kept = vectors.flip(1)[:, :count].T[spread > floor]
    directions: Tensor = kept @ tokens / spread[spread > floor, None] if wide else kept
    return directions


def _input_power(rows: Tensor, tokens: Tensor | None) -> Tensor:
    """Return the mean squared input along each row; of white input where none was seen."""
    if tokens is None:
        return rows.square().sum(dim=1)
    return (tokens.to(rows) @ rows.T).square().mean(dim=0)


@torch.no_grad()
def apply_change(
    layer: LoraView,
    optimizer: AnyOptimizer,
    change: BasisChange,
    rows: Float[Tensor, "grown in_features"] | None = None,
) -> None:
    """Change a layer's weights, its optimizer state and its fields together.

    Args:
        layer: The layer to change.
        optimizer: Holds the layer's parameters.
        change: The maps.
        rows: Values for the rows of `lora_A` that `change` grows, its last ones.
    """
    A = change.to_A @ layer.lora_A.double()
    B = layer.lora_B.double() @ change.to_B
    if rows is not None:
        A[len(A) - len(rows) :] = rows
    size = layer.capacity or len(A)
    rebase_state(optimizer, change, lora_A=layer.factor_A, lora_B=layer.factor_B, size=size)
    _set_matrix(layer.factor_A, A, size)
    _set_matrix(layer.factor_B, B, size)
    layer.set_fields(r=len(A), scaling=layer.scaling * change.scale_ratio)


def set_rank(layer: LoraView, rank: int) -> None:
    """Give a layer tensors of that rank, to be filled by a checkpoint; their content is zero."""
    size = layer.capacity or rank
    if rank != layer.r or layer.factor_A.size != size:
        _set_matrix(layer.factor_A, torch.zeros(rank, layer.in_features), size)
        _set_matrix(layer.factor_B, torch.zeros(layer.out_features, rank), size)
        layer.set_fields(r=rank, scaling=layer.scaling)


@torch.no_grad()
def hold_at(layer: LoraView, rank: int) -> None:
    """Give a layer tensors of that rank for good, the live components first and zeros behind.

    Components whose row of `lora_A` and column of `lora_B` are both zero add nothing and get no
    gradient, so that no mask is needed.
    """
    for factor, matrix in ((layer.factor_A, layer.lora_A), (layer.factor_B, layer.lora_B)):
        if factor.size != rank:
            set_data(factor.parameter, factor.padded(matrix, rank))
    layer.set_capacity(rank)
    layer.set_fields(r=layer.r, scaling=layer.scaling)


def _set_matrix(factor: Factor, matrix: Tensor, size: int) -> None:
    parameter = factor.parameter
    data = factor.padded(matrix.to(parameter.device), size)
    if data.shape == shape_of(parameter):
        # In place: engines and compiled code know the tensor, not the parameter, by its memory.
        overwrite(parameter, data)
    else:
        set_data(parameter, data.to(parameter.dtype))


def set_data(parameter: Parameter, data: Tensor) -> None:
    """Put a tensor of another shape into a parameter that stays the same object.

    A backward graph that is still referenced (a loop that keeps `loss`) holds the parameter's
    gradient accumulator, which remembers the old shape; the next backward would raise. torch
    forgets the accumulator when the dtype of `.data` changes, so the data passes through another.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data.contiguous()
