"""Frozen values passed between stages, and the protocol of a LoRA layer."""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNUSED_KEY: int = torch.iinfo(torch.int64).max
"""Sampling key of padding: kept only if there are too few real tokens."""

SAMPLE_SIZE = 128
"""Input tokens sampled per layer."""

SIGNIFICANT = 2.5
"""Agreement of gradients from which layers have scores, in standard errors: random gradients pass
in 0.6 % of tests, and in at most 3 % of runs with five events."""

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
        """Whether the layer is trained; a frozen layer keeps its weights and rank."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerEvent:
    """Result of one event for one layer, with the statistics behind it."""

    rank_before: int
    rank_after: int
    score: float | None
    """Importance per parameter; None if the layer has no score."""
    share: float
    """Share of the budget before rounding to ranks, in ``[0, 1]``; all shares sum to 1."""
    weight: float
    """Layer weight, in ``[0.5, 2]``; 1 unless `layer_weights` is on."""
    variance: float | None
    """Input variance (see `FeatureStats`); None if no input was sampled."""
    effective_rank: float | None
    """Effective rank of the input; None if no input was sampled."""
    output_lost: float
    """Norm of the dropped output, relative to the layer's output norm on the sampled tokens."""
    waits: bool
    """Whether only `shrink_tolerance` kept the layer from shrinking further."""
    directions: float | None = None
    """Number of output directions of the gradients so far, at least 1; None if unknown."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Event:
    """One reallocation: a line of `ranks.jsonl`."""

    step: int
    """Optimizer steps taken before the event."""
    parameters: int
    """Live LoRA parameters after the event."""
    agreement: float
    """Agreement of consecutive gradients in standard errors; fixed once an event measures at least
    `SIGNIFICANT`, from which on layers have scores."""
    layers: Mapping[str, LayerEvent]

    def __repr__(self) -> str:
        """Return how many ranks changed, instead of hundreds of figures."""
        changed = sum(layer.rank_before != layer.rank_after for layer in self.layers.values())
        return (
            f"Event(step={self.step}, parameters={self.parameters}, "
            f"agreement={self.agreement:.1f}, changed={changed} of {len(self.layers)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the event as a JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Event":
        """Return the event that `to_dict` converted."""
        layers = {name: LayerEvent(**layer) for name, layer in values["layers"].items()}
        figures = {key: values[key] for key in ("step", "parameters", "agreement")}
        return cls(**figures, layers=layers)
