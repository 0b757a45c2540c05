"""The tasks by name."""

from collections.abc import Mapping

from dynlora.train.config import TaskName
from dynlora.train.task import Task
from dynlora.train.tasks.causal_lm import CAUSAL_LM
from dynlora.train.tasks.dpo import DPO
from dynlora.train.tasks.image_classification import IMAGE_CLASSIFICATION
from dynlora.train.tasks.image_text_retrieval import IMAGE_TEXT_RETRIEVAL
from dynlora.train.tasks.image_text_to_text import IMAGE_TEXT_TO_TEXT
from dynlora.train.tasks.sequence import EMBEDDING, MULTI_LABEL, REGRESSION, SEQUENCE_CLASSIFICATION
from dynlora.train.tasks.token_classification import TOKEN_CLASSIFICATION

TASKS: Mapping[TaskName, Task] = {
    "sequence_classification": SEQUENCE_CLASSIFICATION,
    "regression": REGRESSION,
    "multi_label": MULTI_LABEL,
    "embedding": EMBEDDING,
    "token_classification": TOKEN_CLASSIFICATION,
    "causal_lm": CAUSAL_LM,
    "dpo": DPO,
    "image_classification": IMAGE_CLASSIFICATION,
    "image_text_retrieval": IMAGE_TEXT_RETRIEVAL,
    "image_text_to_text": IMAGE_TEXT_TO_TEXT,
}
