"""Load, validate and encode both splits of a job."""

import logging
from typing import Any

from dynlora.train.config import DataConfig
from dynlora.train.data.splits import load_splits
from dynlora.train.task import Task, TaskData

logger = logging.getLogger(__name__)


def load_data(task: Task, config: DataConfig, processor: Any) -> TaskData:
    """Load, validate and encode both splits, and warn about truncated rows.

    The number of labels comes from the configuration, or else from the training rows.

    Raises:
        DataError: If a column or split is missing, a split is empty, or a row is invalid for the
            task.
    """
    train_split, validation_split = load_splits(config)
    train = task.read_split(train_split, config, processor, config.num_labels)
    validation = task.read_split(validation_split, config, processor, train.num_labels)
    if train.cut + validation.cut:
        logger.warning(
            "%d of %d training and %d of %d validation inputs are longer than "
            "data.max_length=%d tokens and were cut.",
            train.cut, len(train.inputs), validation.cut, len(validation.inputs), config.max_length,
        )  # fmt: skip
    return TaskData(
        train=train.inputs,
        validation=validation.inputs,
        num_labels=train.num_labels,
        cut={"train": train.cut, "validation": validation.cut},
        class_names=train_split.class_names,
    )
