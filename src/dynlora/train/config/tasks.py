"""The tasks by name, and the metrics that each reports. Nothing heavy is imported here."""

from collections.abc import Mapping
from typing import Literal

TaskName = Literal[
    "sequence_classification",
    "regression",
    "multi_label",
    "embedding",
    "token_classification",
    "causal_lm",
    "image_classification",
]

METRICS: Mapping[TaskName, tuple[str, ...]] = {
    "sequence_classification": ("accuracy", "f1", "matthews", "loss"),
    "regression": ("pearson", "spearman", "rmse", "loss"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match", "loss"),
    "embedding": ("r2", "cosine", "loss"),
    "token_classification": ("accuracy", "macro_f1", "loss"),
    "causal_lm": ("token_accuracy", "perplexity", "loss"),
    "image_classification": ("accuracy", "f1", "matthews", "loss"),
}
"""By task, the validation metrics in the order in which they are shown, the main one first."""
