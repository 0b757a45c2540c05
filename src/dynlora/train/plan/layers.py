"""Which layers an adapter is on, by kind, and when and within what their ranks can move."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from peft.tuners.lora import LoraLayer

from dynlora.adapters.layers import find_lora_layers
from dynlora.adjuster import bound_layers, default_max_rank
from dynlora.config import DynamicLoraConfig
from dynlora.schedule import event_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers of the same name in every block, and of the same shape."""

    ending: str
    """Last part of their names."""
    kind: str
    """Type of the layer that the adapter is on."""
    count: int
    in_features: int
    out_features: int
    parameters: int
    """Parameters of the adapter on one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRoom:
    """When and within what ranks will move."""

    lowest: int
    """Lowest rank that a layer can get."""
    highest: int
    """Highest rank that a layer can get."""
    pinned: int
    """Layers whose rank will not move."""
    events: Sequence[int]
    """Optimizer steps after which ranks may move."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values by name."""
        return asdict(self) | {"events": list(self.events)}


def group_layers(model: Any) -> list[LayerGroup]:
    """Return the layers that carry a LoRA adapter, largest groups first."""
    counts = Counter(
        LayerGroup(
            ending=name.rpartition(".")[2],
            kind=type(module.get_base_layer()).__name__,
            count=1,
            in_features=module.in_features,
            out_features=module.out_features,
            parameters=sum(
                parameter.numel()
                for part in module.adapter_layer_names
                for parameter in module.get_submodule(part).parameters()
            ),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    )
    return [replace(group, count=count) for group, count in counts.most_common()]


def plan_ranks(model: Any, config: DynamicLoraConfig, r: int, steps: int) -> RankRoom:
    """Return how ranks will move.

    Args:
        model: PEFT's model with its adapter, before training.
        config: How they move.
        r: Rank that the adapter is configured with.
        steps: Optimizer steps of the run.

    Raises:
        LayerError: If there is no LoRA layer, or one that cannot be resized.
    """
    layers = find_lora_layers(model, None)
    highest = config.max_rank or default_max_rank(r, (layer.r for layer in layers))
    bounds = bound_layers(layers, config, max_rank=highest).values()
    return RankRoom(
        lowest=min(bound.floor for bound in bounds),
        highest=max(bound.ceiling for bound in bounds),
        pinned=sum(bound.floor == bound.ceiling == bound.held for bound in bounds),
        events=event_steps(
            total_steps=config.total_steps or steps,
            first_event=config.first_event,
            last_event=config.last_event,
            events=config.events,
        ),
    )
