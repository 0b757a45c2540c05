"""Dynamic-rank LoRA: one budget of adapter parameters that moves while the model trains."""

from dynlora.config import DynamicLoraConfig
from dynlora.controller import DynamicLora
from dynlora.integrations.trainer import DynamicLoraCallback
from dynlora.types import Event, FeatureStats, LayerEvent, RankPlan

__all__ = [
    "DynamicLora",
    "DynamicLoraCallback",
    "DynamicLoraConfig",
    "Event",
    "FeatureStats",
    "LayerEvent",
    "RankPlan",
]
