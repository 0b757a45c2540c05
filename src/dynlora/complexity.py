"""How varied an example is: features to an exact variance, its distribution, a share of the rank.

An example's complexity is the variance of its features over its tokens. It is computed in whole
numbers and, where a fraction is needed, element by element: nothing depends on the order of a sum.
The same tokens give the same bits in any batch, under any padding, with a cache or without, so that
rounding near a threshold can never give an example another rank than it has alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dynlora.types import UNUSED_KEY

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Part of a layer's components that an example uses, by the quarter that its complexity is in."""

SAMPLE_SIZE = 1024
"""Complexities kept, from which the thresholds are taken."""

FEATURE_BITS = 15
"""A feature is a whole number of at most 2 ** 15: then sums over 2 ** 18 tokens of 2 ** 14 features
stay below 2 ** 63."""

_MEAN_BITS = 16
"""Binary digits after the point with which the mean's square is rounded before it is summed."""

_AT_ONCE = 1 << 20
"""Numbers that are summed up at a time, so that memory does not grow with the features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What the tokens of a batch are, as whole numbers of a unit; not read before it is needed."""

    width: int
    """Features of a token."""
    unit: float
    """What 1 stands for, in activation units; a power of two."""
    read: Callable[[slice], Int[Tensor, "batch tokens columns"]]
    """From columns to their values, each of at most ``2 ** FEATURE_BITS``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """What is known of each sequence's unmasked tokens so far: all that the next ones need."""

    count: Int[Tensor, " batch"]
    sums: Int[Tensor, "batch width"]
    """Sum of the features."""
    squares: Int[Tensor, " batch"]
    """Sum of the squares of all features."""


def unit_for(largest: float) -> float:
    """Return the smallest unit, a power of two, in which `largest` is within `FEATURE_BITS`."""
    return math.ldexp(1.0, math.frexp(largest)[1] - FEATURE_BITS)


def in_units(values: Tensor, unit: float) -> Tensor:
    """Return values as whole numbers of a unit; what is out of range goes to its end."""
    limit = 1 << FEATURE_BITS
    return (values.double() / unit).round().clamp(-limit, limit).long()


def running_variance(
    features: Features, mask: Bool[Tensor, "batch tokens"], before: Prefix | None = None
) -> tuple[Float[Tensor, "batch tokens"], Prefix]:
    """Return, at each token, the variance of the features up to and with it.

    That is the mean over the features of their unbiased variance over the unmasked tokens, in
    float64 and squared activation units; NaN until there are two. Divided by ``n - 1`` it does not
    grow with the length of the prefix.

    Args:
        features: Of the tokens.
        mask: True where a token counts.
        before: What came before these tokens; None at the beginning.

    Returns:
        The variances, and the sequences' prefixes after these tokens.
    """
    kept = mask.long()
    known = before or _empty(len(mask), features.width, mask.device)
    count = known.count[:, None] + kept.cumsum(dim=1)
    several = count.clamp(min=1)
    squares, centre, sums = torch.zeros_like(count), torch.zeros_like(count), []
    width = max(1, _AT_ONCE // max(1, mask.numel()))
    for start in range(0, features.width, width):
        columns = slice(start, start + width)
        values = features.read(columns) * kept[..., None]
        total = values.cumsum(dim=1) + known.sums[:, None, columns]
        mean = total.double() / several[..., None]
        squares += values.square().sum(dim=-1)
        centre += (mean.square() * 2**_MEAN_BITS).round().long().sum(dim=-1)
        sums.append(total[:, -1])
    squares = squares.cumsum(dim=1) + known.squares[:, None]
    spread = (squares.double() / several - centre.double() / 2**_MEAN_BITS).clamp(min=0)
    variance = spread * count / (count - 1).clamp(min=1) * (features.unit**2 / features.width)
    after = Prefix(count=count[:, -1], sums=torch.cat(sums, dim=1), squares=squares[:, -1])
    return variance.masked_fill(count < 2, math.nan), after


def _empty(batch: int, width: int, device: torch.device) -> Prefix:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return Prefix(count=zeros(batch), sums=zeros(batch, width), squares=zeros(batch))


def quarter_of(
    complexity: Float[Tensor, "*rows"], thresholds: tuple[float, ...]
) -> Int[Tensor, "*rows"]:
    """Return which quarter each complexity is in: how many thresholds it reaches.

    One that is not known (NaN) counts as highest, as do all before there are thresholds. Where all
    examples are equally complex, so are the thresholds, and all are in the highest quarter.
    """
    if not thresholds:
        return torch.full_like(complexity, len(FRACTIONS) - 1, dtype=torch.int64)
    bounds = torch.tensor(thresholds, dtype=complexity.dtype, device=complexity.device)
    quarter = torch.bucketize(complexity.contiguous(), bounds, right=True)
    return quarter.masked_fill(complexity.isnan(), len(thresholds))


def components_used(r: int) -> tuple[int, ...]:
    """Return how many of `r` components are used in each quarter, at least 1 and at last all."""
    return tuple(math.ceil(r * fraction) for fraction in FRACTIONS)


class ComplexitySample:
    """A uniform sample of the complexities seen in training; the smallest keys stay (bottom-k)."""

    def __init__(self) -> None:
        self._keys = torch.empty(0, dtype=torch.int64, device="cpu")
        self._values = torch.empty(0, dtype=torch.float64, device="cpu")

    def observe(self, keys: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Offer complexities to the sample.

        Args:
            keys: Sampling key of each, `UNUSED_KEY` for padding.
            values: Complexities; NaN where one is not known.
        """
        known = (keys != UNUSED_KEY) & ~values.isnan()
        keys = torch.cat([self._keys, keys[known].cpu()])
        values = torch.cat([self._values, values[known].cpu()])
        self._keys, index = torch.topk(keys, min(SAMPLE_SIZE, len(keys)), largest=False)
        self._values = values[index]

    def thresholds(self) -> tuple[float, ...]:
        """Return the three quartiles of what was seen; empty if nothing was."""
        if len(self._values) == 0:
            return ()
        places = torch.tensor(FRACTIONS[:-1], dtype=torch.float64, device="cpu")
        return tuple(torch.quantile(self._values, places).tolist())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sample as tensors."""
        return {"keys": self._keys, "values": self._values}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self._keys, self._values = state["keys"].cpu(), state["values"].cpu()
