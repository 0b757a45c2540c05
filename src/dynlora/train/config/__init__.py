"""The configuration of a training job: what the YAML file and the dotted options may say.

One file a section. No defaults for model and data. The string under a field is its only
description; the command line's help shows it. Nothing heavy is imported here, so that the help
appears at once.
"""

from dynlora.train.config.adapter import AdaLoraSettings, LoraSettings
from dynlora.train.config.data import DataConfig
from dynlora.train.config.job import JobConfig, Method
from dynlora.train.config.model import ModelConfig
from dynlora.train.config.tasks import METRICS, TaskName
from dynlora.train.config.training import Interval, TrainingConfig

__all__ = [
    "METRICS",
    "AdaLoraSettings",
    "DataConfig",
    "Interval",
    "JobConfig",
    "LoraSettings",
    "Method",
    "ModelConfig",
    "TaskName",
    "TrainingConfig",
]
