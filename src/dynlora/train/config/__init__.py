"""The configuration of a job, as in its YAML file: one pydantic dataclass per section.

The string under a key describes it. Nothing heavy is imported, so that help appears immediately.
"""

from dynlora.train.config.adapter import AdaLoraSettings, LoraSettings
from dynlora.train.config.job import METRICS, JobConfig, Method, TaskName
from dynlora.train.config.sections import DataConfig, ModelConfig, TrainingConfig

__all__ = [
    "METRICS",
    "AdaLoraSettings",
    "DataConfig",
    "JobConfig",
    "LoraSettings",
    "Method",
    "ModelConfig",
    "TaskName",
    "TrainingConfig",
]
