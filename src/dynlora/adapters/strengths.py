"""Strength of each component: its contribution to the output on observed input, in r x r space."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynlora.adapters.layers import LoraView
from dynlora.small_matrices import batched, output_directions
from dynlora.types import SAMPLE_SIZE, FeatureStats, Tokens

NOTHING = 1e-14
"""Smallest squared strength that counts, relative to the strongest component's: the square of
float32's resolution."""

WORKING_BYTES = 2**27
"""Approximate memory that an event uses per block of layers, in float64; a single layer may need
more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Strengths:
    """Components of a LoRA layer or of one of its experts, strongest first, and maps."""

    values: Float[Tensor, " r"]
    """Root mean square over the tokens of each component's output norm, scaling included; trailing
    zeros are untrained directions."""
    to_A: Float[Tensor, "r r"]
    to_B: Float[Tensor, "r r"]
    order: list[int]
    """Indices of the layer's directions, trained ones first."""
    trained: int
    """Number of nonzero columns of `lora_B`."""


def dropped_norm(strengths: Sequence[Strengths], rank: int) -> Float[Tensor, ""]:
    """Return the root mean square norm of the output of a layer that is dropped at this rank."""
    return torch.cat([found.values[rank:] for found in strengths]).square().sum().sqrt()


@torch.no_grad()
def measure_strengths(
    layers: Sequence[LoraView], tokens: Sequence[Tokens | None]
) -> list[list[Strengths]]:
    """Compute each layer's components on the observed tokens, per expert.

    Without tokens, strengths are singular values. Directions with a zero column of `lora_B` come
    last and stay unchanged, because refactoring would zero their rows of `lora_A`, which then never
    train again.
    """
    orders, trained = _trained_first(layers)
    seen = _seen(layers, tokens)
    factors = [A for layer in layers for A in _matrices(layer.lora_A.double())]
    used = [order[:count] for order, count in zip(orders, trained, strict=True)]
    found = batched(
        _components,
        [A[order] for A, order in zip(factors, orders, strict=True)],
        [left[:, directions] for (left, _), directions in zip(seen, used, strict=True)],
        [right[:, directions] for (_, right), directions in zip(seen, used, strict=True)],
        [torch.tensor(order, device=seen[0][0].device) for order in orders],
    )
    every = zip(found, orders, trained, strict=True)
    return [
        [
            Strengths(
                values=values * abs(layer.scaling), to_A=to_A, to_B=to_B, order=order, trained=count
            )
            for (values, to_A, to_B), order, count in islice(every, layer.experts)
        ]
        for layer in layers
    ]


def _matrices(factor: Tensor) -> Sequence[Float[Tensor, "_ _"]]:
    """Return the matrix of each expert; of most layers, the only one."""
    return factor.unbind() if factor.dim() > 2 else [factor]


def _seen(
    layers: Sequence[LoraView], tokens: Sequence[Tokens | None]
) -> list[tuple[Float[Tensor, "_ r"], Float[Tensor, "_ r"]]]:
    """Return both factors applied to the tokens, per expert."""
    pairs = [layer.see(shown) for layer, shown in zip(layers, tokens, strict=True)]
    return [parts for pair in pairs for parts in zip(*map(_matrices, pair), strict=True)]


def _trained_first(layers: Sequence[LoraView]) -> tuple[list[list[int]], list[int]]:
    """Return each expert's directions, trained ones first, and the number of trained ones."""
    flags = torch.cat([layer.lora_B.any(dim=-2).flatten() for layer in layers])
    answers = iter(flags.tolist())  # one transfer for all layers
    used = [list(islice(answers, layer.r)) for layer in layers for _ in range(layer.experts)]
    orders = [sorted(range(len(some)), key=some.__getitem__, reverse=True) for some in used]
    return orders, [sum(some) for some in used]


def _components(
    A: Float[Tensor, "layers r in_features"],
    left: Float[Tensor, "layers _ trained"],
    right: Float[Tensor, "layers _ trained"],
    order: Int[Tensor, "layers r"],
) -> tuple[Float[Tensor, "layers r"], Float[Tensor, "layers r r"], Float[Tensor, "layers r r"]]:
    """Return strengths without scaling, and the maps to and from components.

    `A` has trained directions first; `left` and `right` are `LoraView.see` of these.
    """
    R = torch.linalg.qr(right, mode="r").R
    squares, U = output_directions(R, left.mT @ left)
    count, active = squares.shape[1], R.shape[2]  # fewer if outputs are fewer
    to_A = U.mT @ R
    norms = (to_A @ A[:, :active]).norm(dim=2)
    # Rows of A keep their usual norm and B carries the strength, as in a new adapter.
    usual = A.norm(dim=2).square().mean(dim=1, keepdim=True).sqrt()
    balance = torch.where(norms > 0, norms / usual, 1.0)
    values = torch.zeros_like(A[:, :, 0])
    values[:, :count] = squares.sqrt()
    # Maps in sorted order. Directions beyond the number of outputs have no strength, but like
    # untrained ones they must keep their rows.
    basis_A, basis_B = (A.new_zeros(len(A), A.shape[1], A.shape[1]) for _ in range(2))
    basis_A[:, :count, :active] = to_A / balance[:, :, None]
    basis_A.diagonal(dim1=1, dim2=2)[:, count:] = 1
    basis_B[:, :active, :count] = torch.linalg.pinv(R, rtol=1e-10) @ U * balance[:, None]
    basis_B.diagonal(dim1=1, dim2=2)[:, active:] = 1
    back = order.argsort(dim=1)
    return (
        values,
        basis_A.take_along_dim(back[:, None], dim=2),
        basis_B.take_along_dim(back[:, :, None], dim=1),
    )


def squared_strengths(
    layers: Sequence[LoraView], tokens: Sequence[Tokens | None]
) -> list[Float[Tensor, " r"]]:
    """Return each layer's squared strengths, strongest first (see `measure_strengths`).

    Those of a stack are summed over its experts, which shrink together.
    """
    found = measure_strengths(layers, tokens)
    sums = [torch.stack([e.values for e in experts]).square().sum(dim=0) for experts in found]
    # Rounding errors must not count as strength.
    return [torch.where(squares > NOTHING * squares[:1], squares, 0) for squares in sums]


def lowest_ranks(squares: Sequence[Float[Tensor, " _"]], tolerated: Sequence[float]) -> list[int]:
    """Return the lowest rank per layer that drops at most `tolerated`, by `squared_strengths`."""
    # Exclude the strongest component, which always stays, before padding with zeros.
    weaker = [some[1:].flip(0) for some in squares]
    weakest_first = pad_sequence(weaker, batch_first=True, padding_side="left")
    # On the CPU, because torch's deterministic mode refuses cumulative sums on a GPU.
    allowed = torch.tensor(tolerated, dtype=torch.float64, device="cpu")
    too_much = weakest_first.cpu().cumsum(dim=1).sqrt() > allowed[:, None]
    found: list[int] = (1 + too_much.sum(dim=1)).tolist()
    return found


def in_blocks(layers: Iterable[LoraView]) -> Iterator[list[LoraView]]:
    """Yield layers in order, in blocks of about `WORKING_BYTES` and at least one layer."""
    block: list[LoraView] = []
    used = 0
    for layer in layers:
        needed = 8 * (SAMPLE_SIZE * layer.in_features + 2 * layer.r * layer.cost)
        if block and used + needed > WORKING_BYTES:
            yield block
            block, used = [], 0
        block.append(layer)
        used += needed
    if block:
        yield block


def enough_seen(
    layers: Sequence[LoraView], features: Mapping[str, FeatureStats]
) -> list[FeatureStats | None]:
    """Return each layer's input statistics; None with fewer tokens than components.

    With fewer, some components would seem to add nothing. `kinds` accounts for unseen ids.
    """
    found = []
    for layer in layers:
        stats = features.get(layer.name)
        few = stats is not None and stats.tokens.is_floating_point() and len(stats.tokens) < layer.r
        found.append(None if few else stats)
    return found


def tokens_of(stats: FeatureStats | None) -> Tokens | None:
    """Return the sampled tokens; None without a sample, which stands for unit-covariance input."""
    return None if stats is None else stats.tokens


def output_norm(layer: LoraView, stats: FeatureStats | None) -> float:
    """Return the root mean square norm of the output (`base_norm` without sample); 1 if it is 0."""
    norm = layer.base_norm if stats is None else float(stats.output_power**0.5)
    return norm or 1.0
