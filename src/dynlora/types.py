"""The frozen values that stages hand to one another, and the view of a LoRA layer that they read.

Nothing here computes. `BasisChange` is the one description of a change of rank: the adapters apply
it to the weights, and the optimizer's moments and the importance metrics follow the same two maps.
"""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora.layer_shape import LayerShape

UNUSED_KEY: int = torch.iinfo(torch.int64).max
"""Sampling key of padding: never kept while a real token is to be had."""

Tokens = Float[Tensor, "_ _"] | Int[Tensor, " _"]
"""What enters a layer: vectors, ``(n, in_features)``, or n ids that an embedding looks up."""


@runtime_checkable
class LoraLayer(LayerShape, Protocol):
    """What a stage may read of one LoRA layer, which adds ``scaling * lora_B @ lora_A @ x``.

    Of any kind: factors and gradients are matrices whatever PEFT holds, and `lora_B` is the factor
    that starts at zero.
    """

    @property
    def out_features(self) -> int:
        """Rows of `lora_B`."""
        ...

    @property
    def scaling(self) -> float:
        """Factor on the layer's output; does not change with the rank."""
        ...

    @property
    def lora_A(self) -> Tensor:
        """Matrix of shape ``(r, in_features)``."""
        ...

    @property
    def lora_B(self) -> Tensor:
        """Matrix of shape ``(out_features, r)``."""
        ...

    @property
    def grad_A(self) -> Tensor:
        """Gradient of `lora_A`, of its shape; zeros where no backward pass left one."""
        ...

    @property
    def grad_B(self) -> Tensor:
        """Gradient of `lora_B` over `weight`, of its shape; zeros where no backward pass left one.

        A layer weight multiplies it: scored by it, the weight would feed back on itself.
        """
        ...

    @property
    def weight(self) -> float:
        """Layer weight, which multiplies the output and divides `lora_B`."""
        ...

    @property
    def finite(self) -> Tensor:
        """Whether both gradients are finite in all elements: a boolean of shape ``()``.

        On the layer's device, because who reads it waits until all that was asked of it is done.
        """
        ...

    def added_power(self, tokens: Tokens) -> float:
        """Return the mean squared norm of what the adapter adds on these tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """The ranks that all layers shall have after an event."""

    step: int
    """Optimizer steps taken when the plan was made."""
    ranks: Mapping[str, int]
    """Rank by module name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assessment:
    """What gradients say of the layers, by module name."""

    scores: Mapping[str, float]
    """Importance per parameter, at least 0; none while nothing is known."""
    directions: Mapping[str, float]
    """In how many directions of the output gradients pointed so far, at least 1."""
    unreached: Set[str] = frozenset()
    """Trained layers without a gradient in every observed step so far; they have no score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStats:
    """What is known of one layer's input since the last event."""

    tokens: Tokens
    """Sampled inputs, a uniform sample of the unmasked tokens seen; float32, or ids."""
    variance: float
    """Mean over the input dimensions of their variance, in squared activation units; an id counts
    as a one-hot vector over the ids sampled."""
    effective_rank: float
    """Entropy-based effective rank of the centred inputs, in ``[1, in_features]``."""
    output_power: float
    """Mean squared norm of the layer's output (base plus adapter) on `tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BasisChange:
    """A change of one layer's rank or scale, as linear maps on its rank dimension.

    The weights follow ``A' = to_A @ A`` (plus new rows where a rank was grown) and
    ``B' = B @ to_B``. Gradients follow the contragredient maps:
    ``dB' = scale_ratio * dB @ to_A.T`` and ``dA' = scale_ratio * to_B.T @ dA``.
    """

    name: str
    """Module name."""
    to_A: Float[Tensor, "new old"]
    """Map from the old rows of `lora_A` to the new ones; a grown row is zero here."""
    to_B: Float[Tensor, "old new"]
    """Map from the old columns of `lora_B` to the new ones; a grown column is zero here."""
    scale_ratio: float = 1.0
    """New `scaling` divided by the old."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerEvent:
    """What one event did to one layer, and from which figures."""

    rank_before: int
    rank_after: int
    score: float | None
    """Importance per parameter; None where none was available."""
    share: float
    """Share of the budget that scores ask for, in ``[0, 1]``; all layers' shares sum to 1."""
    weight: float
    """Layer weight, in ``[0.5, 2]``; 1 unless `layer_weights` is on."""
    variance: float | None
    """Input variance (see `FeatureStats`); None where no input was seen."""
    effective_rank: float | None
    """Effective rank of the input; None where no input was seen."""
    output_lost: float
    """Norm of the part dropped, relative to the layer's output norm on the observed tokens."""
    waits: bool
    """True where the layer would have shrunk further but for `shrink_tolerance`."""
    directions: float | None = None
    """In how many directions of the output gradients pointed so far, at least 1; None where not
    known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One reallocation: a line of `ranks.jsonl`."""

    step: int
    """Optimizer steps taken before the event."""
    parameters: int
    """Live LoRA parameters after the event."""
    agreement: float
    """How far consecutive gradients agree, in standard errors, measured until an event finds 2.5 or
    more: from there on scores count."""
    layers: Mapping[str, LayerEvent]

    def to_dict(self) -> dict[str, Any]:
        """Return the event as JSON-ready values."""
        return {
            "step": self.step,
            "parameters": self.parameters,
            "agreement": self.agreement,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Event":
        """Rebuild an event from `to_dict`'s output."""
        layers = {name: LayerEvent(**layer) for name, layer in values["layers"].items()}
        return cls(
            step=values["step"],
            parameters=values["parameters"],
            agreement=values["agreement"],
            layers=layers,
        )
