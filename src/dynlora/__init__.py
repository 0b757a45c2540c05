"""Dynamic-rank LoRA: one parameter budget, moved between layers during training.

Public names are imported on first use, so that `dynlora --help` does not load torch.
"""

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynlora.adapters.extension import Extension
    from dynlora.config import DynamicLoraConfig
    from dynlora.controller import DynamicLora
    from dynlora.fused.layers import FusedLora
    from dynlora.history import Event, LayerEvent
    from dynlora.importance import ImportanceMetric
    from dynlora.input_adaptive.file import load_input_adaptive, save_input_adaptive
    from dynlora.input_adaptive.ranks import InputAdaptiveRanks
    from dynlora.integrations.trainer import DynamicLoraCallback
    from dynlora.types import FeatureStats, RankPlan

__all__ = [
    "DynamicLora",
    "DynamicLoraCallback",
    "DynamicLoraConfig",
    "Event",
    "Extension",
    "FeatureStats",
    "FusedLora",
    "ImportanceMetric",
    "InputAdaptiveRanks",
    "LayerEvent",
    "RankPlan",
    "load_input_adaptive",
    "save_input_adaptive",
]

_MODULES = {
    "DynamicLora": "dynlora.controller",
    "DynamicLoraCallback": "dynlora.integrations.trainer",
    "DynamicLoraConfig": "dynlora.config",
    "Event": "dynlora.history",
    "Extension": "dynlora.adapters.extension",
    "FeatureStats": "dynlora.types",
    "FusedLora": "dynlora.fused.layers",
    "ImportanceMetric": "dynlora.importance",
    "InputAdaptiveRanks": "dynlora.input_adaptive.ranks",
    "LayerEvent": "dynlora.history",
    "RankPlan": "dynlora.types",
    "load_input_adaptive": "dynlora.input_adaptive.file",
    "save_input_adaptive": "dynlora.input_adaptive.file",
}

_TESTED = {"peft": (0, 21), "transformers": (5, 24)}
"""The newest minor versions that the tests ran with."""

for _package, _newest in _TESTED.items():
    _installed = version(_package)
    if tuple(map(int, _installed.split(".")[:2])) > _newest:
        warnings.warn(
            f"dynlora was tested with {_package} up to {'.'.join(map(str, _newest))}, and "
            f"{_installed} is installed. If something fails, install an earlier {_package}.",
            stacklevel=2,
        )


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dynlora' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
