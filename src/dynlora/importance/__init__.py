"""Stage 1. Layer importance assessor: one metric per file, chosen by name."""

from collections.abc import Callable

from dynlora.config import ImportanceName
from dynlora.importance.activation_ratio import ActivationRatioMetric
from dynlora.importance.assessor import LayerImportanceAssessor
from dynlora.importance.attention_entropy import AttentionEntropyMetric
from dynlora.importance.fisher import FisherMetric
from dynlora.importance.gradient_norm import GradientNormMetric
from dynlora.importance.magnitude import MagnitudeMetric
from dynlora.importance.protocol import ImportanceMetric
from dynlora.importance.random import RandomMetric
from dynlora.importance.sensitivity import SensitivityMetric
from dynlora.importance.signal import SignalMetric
from dynlora.importance.spectral import SpectralMetric
from dynlora.importance.uniform import UniformMetric

_METRICS: dict[ImportanceName, Callable[[], ImportanceMetric]] = {
    "signal": SignalMetric,
    "sensitivity": SensitivityMetric,
    "gradient_norm": GradientNormMetric,
    "fisher": FisherMetric,
    "spectral": SpectralMetric,
    "activation_ratio": ActivationRatioMetric,
    "magnitude": MagnitudeMetric,
    "attention_entropy": AttentionEntropyMetric,
    "uniform": UniformMetric,
}


def build_metric(name: ImportanceName, *, seed: int) -> ImportanceMetric:
    """Return a new metric; only `random` uses `seed`."""
    return RandomMetric(seed) if name == "random" else _METRICS[name]()


__all__ = ["ImportanceMetric", "LayerImportanceAssessor", "build_metric"]
