"""Frozen values passed between stages, and the protocol of a LoRA layer."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNUSED_KEY: int = torch.iinfo(torch.int64).max
"""Sampling key of padding: kept only if there are too few real tokens."""

SAMPLE_SIZE = 128
"""Input tokens sampled per layer."""

Tokens = Float[Tensor, "_ _"] | Int[Tensor, " _"]
"""Inputs of a layer: vectors of shape ``(n, in_features)``, or n ids for an embedding."""


@runtime_checkable
class LayerShape(Protocol):
    """Name, rank and size of one LoRA layer, as the adjuster needs them."""

    @property
    def name(self) -> str:
        """Name of the module or adapted parameter in the base model."""

    @property
    def r(self) -> int:
        """Live rank."""

    @property
    def widest(self) -> int:
        """Rank of a full update of the layer."""

    @property
    def cost(self) -> int:
        """Parameters per rank: ``in_features + out_features``, times the number of experts."""

    @property
    def is_trained(self) -> bool:
        """Whether the layer is trained; a frozen layer keeps its rank and what it computes."""


@runtime_checkable
class LoraLayer(LayerShape, Protocol):
    """Read-only view of one LoRA layer, which adds ``scaling * lora_B @ lora_A @ x``.

    Factors and gradients are matrices for every kind of layer. `lora_B` is the factor that starts
    at zero. Those of a stack of experts have a first axis more, with one matrix per expert.
    """

    @property
    def out_features(self) -> int:
        """Rows of `lora_B`."""

    @property
    def scaling(self) -> float:
        """Factor on the adapter's output; independent of the rank."""

    @property
    def lora_A(self) -> Tensor:
        """Matrix of shape ``(r, in_features)``."""

    @property
    def lora_B(self) -> Tensor:
        """Matrix of shape ``(out_features, r)``."""

    @property
    def grad_A(self) -> Tensor:
        """Gradient of `lora_A`, in its shape; zeros if the layer has no gradient."""

    @property
    def grad_B(self) -> Tensor:
        """Gradient of `lora_B` over `weight`, in its shape; zeros if the layer has no gradient.

        The division prevents a feedback: the layer weight scales the gradient, and follows from it.
        """

    @property
    def weight(self) -> float:
        """Layer weight: multiplies `scaling` and divides `lora_B`."""

    @property
    def finite(self) -> Tensor:
        """Whether both gradients are finite, of shape ``()``; reading it synchronizes."""

    def added_power(self, tokens: Tokens) -> float:
        """Return the mean squared norm of the adapter's output on these tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """Ranks of the layers after an event."""

    step: int
    """Optimizer steps taken before the plan."""
    ranks: Mapping[str, int]
    """Rank by module name."""


_EQUAL_WITHIN = 1e-9
"""Largest relative spread of scores that count as equal (float rounding)."""


def is_informative(scores: Mapping[str, float]) -> bool:
    """Return whether scores differ between layers."""
    if not scores:
        return False
    low, high = min(scores.values()), max(scores.values())
    return high - low > _EQUAL_WITHIN * high


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """Statistics of the gradients, by module name."""

    scores: Mapping[str, float]
    """Importance per parameter, at least 0; empty until gradients agree."""
    directions: Mapping[str, float]
    """Number of output directions of the gradients so far, at least 1."""
    unreached: Set[str] = frozenset()
    """Trained layers without a gradient in any observed step so far; they have no score."""

    @property
    def lowered(self) -> Set[str]:
        """The unreached layers if scores are informative: they get their lowest rank."""
        return self.unreached if is_informative(self.scores) else frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStats:
    """Statistics of one layer's input since the last event."""

    tokens: Tokens
    """Uniform sample of the unmasked input tokens; float32, or ids."""
    variance: float
    """Variance averaged over the input dimensions, in squared activation units; ids count as
    one-hot vectors over the sampled ids."""
    effective_rank: float
    """Entropy-based effective rank of the centred inputs, in ``[1, in_features]``."""
    output_power: float
    """Mean squared norm of the layer's output (base plus adapter) on `tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BasisChange:
    """A change of one layer's rank or scale, as linear maps on its rank dimension.

    Weights become ``A' = to_A @ A`` (plus new rows if the rank grows) and ``B' = B @ to_B``.
    Gradients, and state derived from them, follow the contragredient maps:
    ``dB' = scale_ratio * dB @ to_A.mT`` and ``dA' = scale_ratio * to_B.mT @ dA``.
    """

    name: str
    to_A: Float[Tensor, "*experts new old"]
    """Map from the old rows of `lora_A` to the new ones; zero for added rows."""
    to_B: Float[Tensor, "*experts old new"]
    """Map from the old columns of `lora_B` to the new ones; zero for added columns."""
    scale_ratio: float = 1.0
    """New `scaling` divided by the old."""
