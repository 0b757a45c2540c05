"""Stage 1. Layer importance assessor: one metric per file; `config.METRICS` names them."""

from copy import deepcopy

from dynlora.config import METRICS, load
from dynlora.importance.assessor import LayerImportanceAssessor
from dynlora.importance.protocol import ImportanceMetric


def build_metric(importance: str | ImportanceMetric, *, seed: int) -> ImportanceMetric:
    """Return a new metric from its name, or a copy of a metric, so that runs share no state.

    Args:
        importance: Name in `METRICS`, or a metric.
        seed: Seed of `random`; no other metric uses it.
    """
    if not isinstance(importance, str):
        return deepcopy(importance)
    kind = load(METRICS[importance])
    metric: ImportanceMetric = kind(seed) if importance == "random" else kind()
    return metric


__all__ = ["ImportanceMetric", "LayerImportanceAssessor", "build_metric"]
