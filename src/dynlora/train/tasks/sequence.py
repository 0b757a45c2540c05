"""Tasks with one label per text or text pair: a class, a number, or a set of classes."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
)

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import (
    check_columns,
    read_class_lists,
    read_classes,
    read_numbers,
    read_texts,
    refuse_rows,
)
from dynlora.train.data.splits import RawSplit
from dynlora.train.data.tokens import tokenize
from dynlora.train.loss import SummedLoss, summed_binary, summed_cross_entropy, summed_squares
from dynlora.train.methods.head import head_modules, linear_layers
from dynlora.train.pretrained import Source, check_length, load_model, load_tokenizer
from dynlora.train.task import Predictor, Split, Task, TaskData, TrainerParts
from dynlora.train.tasks.logits import batch_logits
from dynlora.train.tasks.metrics import (
    classification_metrics,
    multi_label_metrics,
    regression_metrics,
)
from dynlora.train.trainer import Metrics, make_job_trainer

logger = logging.getLogger(__name__)

PROBLEMS = {
    "sequence_classification": "single_label_classification",
    "regression": "regression",
    "multi_label": "multi_label_classification",
}
"""transformers' `problem_type` per task, which decides how outputs become probabilities."""
Labels = tuple[list[Any], int]
"""Labels per row in the model's format, and the number of outputs."""


def read_class_labels(split: RawSplit, column: str, num_labels: int | None) -> Labels:
    """Return one class per row, and the number of classes, at least 2."""
    labels = read_classes(split, column, num_labels)
    return labels, num_labels or max(max(labels) + 1, 2)


def read_number_labels(split: RawSplit, column: str, _num_labels: int | None) -> Labels:
    """Return one number per row, and 1 as the number of outputs."""
    return list(read_numbers(split, column)), 1


def read_list_labels(split: RawSplit, column: str, num_labels: int | None) -> Labels:
    """Return 0 or 1 per row and class, and the number of classes, at least 2."""
    lists = read_class_lists(split, column, num_labels)
    if not any(lists):
        _say_no_class(split, column, num_labels)
    count = num_labels or max(max((max(row, default=0) for row in lists), default=0) + 1, 2)
    return [[float(label in row) for label in range(count)] for row in lists], count


def _say_no_class(split: RawSplit, column: str, num_labels: int | None) -> None:
    """Warn that no row has a class.

    Raises:
        DataError: If `num_labels` is None, because these rows then determine the classes.
    """
    found = f"label column {column!r} holds no class in any of {split.table.num_rows} rows"
    where = f"of the {split.name} split ({split.source})"
    if num_labels is None:
        raise DataError(
            f"{found} {where}, and there must be one to learn: check that `data.label` names the "
            "right column, or set `data.num_labels` if no class is meant."
        )
    logger.warning("%s %s: every class is to be denied for each.", found, where)


def load_processor(source: Source, config: DataConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer."""
    return load_tokenizer(source, config.max_length)


def encode(split: RawSplit, config: DataConfig, tokenizer: Any) -> tuple[dict[str, Any], int]:
    """Return the model's inputs by name, and the number of truncated rows."""
    check_columns(split, {"data.text": config.text, "data.text_pair": config.text_pair})
    pairs = None if config.text_pair is None else read_texts(split, config.text_pair)
    texts = read_texts(split, config.text)
    columns, cut = tokenize(texts, pairs, tokenizer, config.max_length)
    refuse_rows(
        split,
        f"column {config.text!r} must hold texts of which the tokenizer makes tokens",
        [(row, texts[row]) for row, ids in enumerate(columns["input_ids"]) if not ids],
        "Remove these rows or fill them in.",
    )
    return columns, cut


def read_split(
    split: RawSplit,
    config: DataConfig,
    tokenizer: Any,
    num_labels: int | None,
    *,
    read_labels: Callable[[RawSplit, str, int | None], Labels],
) -> Split:
    """Tokenize a split's texts and read its labels with `read_labels`."""
    check_columns(split, {"data.label": config.label})
    columns, cut = encode(split, config, tokenizer)
    labels, count = read_labels(split, config.label, num_labels)
    inputs = datasets.Dataset.from_dict({**columns, "labels": labels})
    return Split(inputs=inputs, cut=cut, num_labels=count)


def _load_model(source: Source, num_labels: int | None, tokenizer: Any, *, problem: str) -> Any:
    model = load_model(
        AutoModelForSequenceClassification, source, num_labels=num_labels, problem_type=problem
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def begin_at_mean(model: Any, data: TaskData) -> None:
    """Set the bias of a new head, which is 0, to the mean training label.

    Otherwise labels far from 0 would first distort the pretrained features.
    """
    bias = model.get_submodule(linear_layers(model, head_modules(model))[-1]).bias
    if bias is not None and not bias.any():
        bias.fill_(float(np.mean(data.train["labels"])))


def make_trainer(parts: TrainerParts, *, loss: SummedLoss, metrics: Metrics) -> Trainer:
    """Return the Trainer of a task with one label per text."""
    collator = DataCollatorWithPadding(parts.processor)
    return make_job_trainer(parts, loss=loss, metrics=metrics, collator=collator)


def predict(
    predictor: Predictor,
    split: RawSplit,
    config: DataConfig,
    *,
    describe: Callable[[Any], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield `describe(logits)` per row."""
    columns, _ = encode(split, config, predictor.processor)
    inputs = datasets.Dataset.from_dict(columns)
    collator = DataCollatorWithPadding(predictor.processor)
    for logits in batch_logits(predictor, inputs, collator):
        yield from map(describe, logits)


def describe_class(logits: torch.Tensor) -> dict[str, Any]:
    """Return the likeliest class and all probabilities from logits of shape ``(classes,)``."""
    probabilities = logits.softmax(dim=-1)
    return {
        "prediction": int(probabilities.argmax()),
        "probabilities": np.round(probabilities.double().numpy(), 6).tolist(),
    }


def describe_number(logits: torch.Tensor) -> dict[str, Any]:
    """Return the predicted number from an output of shape ``(1,)``."""
    return {"prediction": float(logits[0])}


def describe_classes(logits: torch.Tensor) -> dict[str, Any]:
    """Return the classes above probability 0.5 and all probabilities from logits ``(classes,)``."""
    return {
        "prediction": (logits > 0).nonzero().flatten().tolist(),
        "probabilities": np.round(logits.sigmoid().double().numpy(), 6).tolist(),
    }


SEQUENCE_CLASSIFICATION = Task(
    peft_type="SEQ_CLS",
    head=head_modules,
    load_processor=load_processor,
    read_split=partial(read_split, read_labels=read_class_labels),
    load_model=partial(_load_model, problem=PROBLEMS["sequence_classification"]),
    check_model=check_length,
    make_trainer=partial(make_trainer, loss=summed_cross_entropy, metrics=classification_metrics),
    predict=partial(predict, describe=describe_class),
)
REGRESSION = Task(
    peft_type="SEQ_CLS",
    head=head_modules,
    load_processor=load_processor,
    read_split=partial(read_split, read_labels=read_number_labels),
    load_model=partial(_load_model, problem=PROBLEMS["regression"]),
    check_model=check_length,
    begin_head=begin_at_mean,
    make_trainer=partial(make_trainer, loss=summed_squares, metrics=regression_metrics),
    predict=partial(predict, describe=describe_number),
)
MULTI_LABEL = Task(
    peft_type="SEQ_CLS",
    head=head_modules,
    load_processor=load_processor,
    read_split=partial(read_split, read_labels=read_list_labels),
    load_model=partial(_load_model, problem=PROBLEMS["multi_label"]),
    check_model=check_length,
    make_trainer=partial(make_trainer, loss=summed_binary, metrics=multi_label_metrics),
    predict=partial(predict, describe=describe_classes),
)
