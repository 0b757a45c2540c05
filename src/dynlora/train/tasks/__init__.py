"""The tasks by name."""

from collections.abc import Mapping

from dynlora.train.config import TaskName
from dynlora.train.task import Task
from dynlora.train.tasks.sequence import MULTI_LABEL, REGRESSION, SEQUENCE_CLASSIFICATION

TASKS: Mapping[TaskName, Task] = {
    "sequence_classification": SEQUENCE_CLASSIFICATION,
    "regression": REGRESSION,
    "multi_label": MULTI_LABEL,
}
