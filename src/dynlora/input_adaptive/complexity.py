"""Complexity of examples: features in; variances, thresholds and masks of components out.

Sums are of integers and fractions are elementwise, so a result is bitwise equal in any batch, with
any padding or cache. Rounding near a threshold could otherwise change an example's rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dynlora.adapters.layers import LoraView
from dynlora.errors import LayerError
from dynlora.features import smallest
from dynlora.types import UNUSED_KEY

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Fraction of a layer's components that an example uses, per quarter of the complexities."""

COMPLEXITIES = 1024
"""Complexities kept to compute the thresholds."""

FEATURE_BITS = 15
"""Features are integers of at most 2 ** 15, so that sums of squares over 2 ** 18 tokens of 2 ** 14
features stay below 2 ** 63."""

_MEAN_BITS = 16
"""Fractional bits of the squared mean, which is rounded before summation."""

_AT_ONCE = 1 << 20
"""Feature values per chunk, which bounds memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Features of a batch's tokens as integer multiples of a unit, read lazily by column."""

    width: int
    """Features per token."""
    unit: float
    """Unit in activation units; a power of two."""
    read: Callable[[slice], Int[Tensor, "batch tokens columns"]]
    """Returns the values of some columns, of magnitude at most ``2 ** FEATURE_BITS``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """Running sums over each sequence's unmasked tokens so far; of squares also over features."""

    count: Int[Tensor, " batch"]
    sums: Int[Tensor, "batch width"]
    squares: Int[Tensor, " batch"]


def unit_for(largest: float) -> float:
    """Return the smallest power of two in which `largest` fits into `FEATURE_BITS`."""
    return math.ldexp(1.0, math.frexp(largest)[1] - FEATURE_BITS)


def in_units(values: Tensor, unit: float) -> Tensor:
    """Return values as integer multiples of a unit, clamped to ``2 ** FEATURE_BITS``."""
    limit = 1 << FEATURE_BITS
    return (values.double() / unit).round().clamp(-limit, limit).long()


def running_variance(
    features: Features, mask: Bool[Tensor, "batch tokens"], before: Prefix | None = None
) -> tuple[Float[Tensor, "batch tokens"], Prefix]:
    """Return the complexity of each token's prefix, the token included, and the sums after it.

    It is the variance over unmasked tokens, averaged over features, in squared activation units;
    NaN before the second unmasked token. The unbiased estimate (divisor ``n - 1``) does not grow
    with the length of the prefix. `before` is None at the start of the sequences.
    """
    kept = mask.long()
    count, squares = kept.cumsum(dim=1), torch.zeros_like(kept)
    if before is not None:
        count += before.count[:, None]
    several = count.clamp(min=1)
    centre, sums = torch.zeros_like(count), []
    width = max(1, _AT_ONCE // max(1, mask.numel()))
    for start in range(0, features.width, width):
        columns = slice(start, start + width)
        values = features.read(columns) * kept[..., None]
        total = values.cumsum(dim=1)
        if before is not None:
            total += before.sums[:, None, columns]
        mean = total.double() / several[..., None]
        squares += values.square().sum(dim=-1)
        centre += (mean.square() * 2**_MEAN_BITS).round().long().sum(dim=-1)
        sums.append(total[:, -1])
    squares = squares.cumsum(dim=1)
    if before is not None:
        squares += before.squares[:, None]
    spread = (squares.double() / several - centre.double() / 2**_MEAN_BITS).clamp(min=0)
    variance = spread * count / (count - 1).clamp(min=1) * (features.unit**2 / features.width)
    after = Prefix(count=count[:, -1], sums=torch.cat(sums, dim=1), squares=squares[:, -1])
    return variance.masked_fill(count < 2, math.nan), after


def quarter_of(
    complexity: Float[Tensor, "*rows"], thresholds: tuple[float, ...]
) -> Int[Tensor, "*rows"]:
    """Return the quarter of each complexity, as the number of thresholds that it reaches.

    NaN, any complexity without thresholds, and equal complexities are in the highest quarter.
    """
    if not thresholds:
        return torch.full_like(complexity, len(FRACTIONS) - 1, dtype=torch.int64)
    bounds = torch.tensor(thresholds, dtype=complexity.dtype, device=complexity.device)
    quarter = torch.bucketize(complexity.contiguous(), bounds, right=True)
    return quarter.masked_fill(complexity.isnan(), len(thresholds))


def components_used(r: int) -> tuple[int, ...]:
    """Return the number of components used per quarter: at least 1, and all `r` in the last."""
    return tuple(math.ceil(r * fraction) for fraction in FRACTIONS)


@dataclass(kw_only=True, slots=True)
class ComponentMask:
    """Components that layers use in one call of the model; all if `quarter` is None."""

    quarter: Int[Tensor, "batch"] | Int[Tensor, "batch tokens"] | None = None
    """Quarter per example, or per token."""
    rows: tuple[int, ...] = ()
    """Number of examples, and of tokens per example."""
    _by_rank: dict[int, Tensor] = field(default_factory=dict)

    def of(self, layer: LoraView, output: Tensor) -> Tensor:
        """Return the factor on the output of `lora_A`: 1 for used components, otherwise 0."""
        assert self.quarter is not None
        batch, shape = self.rows[0], tuple(output.shape)
        mask, used = self._used(layer.r), tuple(self.quarter.shape)
        convolves = isinstance(layer.factor_A.holder, nn.Conv2d)
        if convolves and len(used) == 1 and len(shape) == 4 and shape[0] == batch:
            mask = mask[:, :, None, None]
        elif not convolves and used == shape[:-1]:
            pass
        elif not convolves and len(used) == 1 and len(shape) > 2 and shape[0] == batch:
            mask = mask.reshape(batch, *[1] * (len(shape) - 2), layer.r)
        elif not convolves and len(shape) == 2 and shape[0] == self.rows[0] * self.rows[1]:
            mask = mask.flatten(0, 1) if len(used) == 2 else mask.repeat_interleave(self.rows[1], 0)
        else:
            raise LayerError(
                f"With input-adaptive ranks, LoRA layer {layer.name!r} must see the tokens of the "
                f"batch, {self.rows}, got rows of shape {shape[:-1]}, which cannot be told apart "
                "(pooled or selected tokens, experts, several adapters in a batch): leave it out "
                "of `target_modules`, or set `input_adaptive=False`."
            )
        return mask.to(output)

    def _used(self, r: int) -> Tensor:
        """Return which of `r` components are used, on an axis behind those of `quarter`."""
        assert self.quarter is not None
        if r not in self._by_rank:
            used = torch.tensor(components_used(r), device=self.quarter.device)[self.quarter]
            self._by_rank[r] = torch.arange(r, device=used.device) < used[..., None]
        return self._by_rank[r]


class ComplexitySample:
    """Uniform sample of the complexities in training: the ones with the smallest keys."""

    def __init__(self) -> None:
        self._keys = torch.empty(0, dtype=torch.int64, device="cpu")
        self._values = torch.empty(0, dtype=torch.float64, device="cpu")

    def observe(self, keys: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Merge complexities into the sample; NaN and `UNUSED_KEY` (padding) do not count."""
        known = (keys != UNUSED_KEY) & ~values.isnan()
        keys = torch.cat([self._keys, keys[known].cpu()])
        values = torch.cat([self._values, values[known].cpu()])
        self._keys, index = smallest(keys, size=COMPLEXITIES)
        self._values = values[index]

    def thresholds(self) -> tuple[float, ...]:
        """Return the three quartiles of the sample; empty without a sample."""
        if len(self._values) == 0:
            return ()
        places = torch.tensor(FRACTIONS[:-1], dtype=torch.float64, device="cpu")
        return tuple(torch.quantile(self._values, places).tolist())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sample."""
        return {"keys": self._keys, "values": self._values}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self._keys, self._values = state["keys"].cpu(), state["values"].cpu()
