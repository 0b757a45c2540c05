"""Tasks with one label per text or text pair: a class, a number, a set of classes, or a vector."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dynlora.adapter_files.base_models import Source
from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import (
    read_class_lists,
    read_classes,
    read_numbers,
    read_texts,
    read_vectors,
    refuse_rows,
)
from dynlora.train.data.splits import RawSplit
from dynlora.train.methods.full_modules import head_modules, linear_layers, unread_poolers
from dynlora.train.pretrained import check_length, load_model, load_tokenizer
from dynlora.train.task import Predictor, Split, Task, TaskData, no_head, row_logits, warn_of_cut
from dynlora.train.tasks.metrics import (
    classification_metrics,
    embedding_metrics,
    multi_label_metrics,
    regression_metrics,
    summed_binary,
    summed_cross_entropy,
    summed_squares,
)
from dynlora.train.trainer import make_job_trainer

logger = logging.getLogger(__name__)

PROBLEMS = {
    "sequence_classification": "single_label_classification",
    "regression": "regression",
    "multi_label": "multi_label_classification",
}
"""transformers' `problem_type` per task, which decides how outputs become probabilities."""
text_trainer = partial(make_job_trainer, collate=DataCollatorWithPadding)
Labels = tuple[list[Any], int]  # labels per row in the model's format, and the number of outputs


def read_class_labels(split: RawSplit, column: str, num_labels: int | None) -> Labels:
    """Return one class per row, and the number of classes, at least 2."""
    labels = read_classes(split, column, num_labels)
    return labels, num_labels or split.count_classes(max(labels))


def read_list_labels(split: RawSplit, column: str, num_labels: int | None) -> Labels:
    """Return 0 or 1 per row and class, and the number of classes, at least 2."""
    lists = read_class_lists(split, column, num_labels)
    if not any(lists):
        found = (
            f"label column {column!r} holds no class in any of {split.table.num_rows} rows of the "
            f"{split.name} split ({split.source})"
        )
        if num_labels is None:
            raise DataError(
                f"{found}, and there must be one to learn: check that `data.label` names the "
                "right column, or set `data.num_labels` if no class is meant."
            )
        logger.warning("%s: every class is to be denied for each.", found)
    count = num_labels or split.count_classes(max(max(row, default=0) for row in lists))
    return [[float(label in row) for label in range(count)] for row in lists], count


def read_vector_labels(split: RawSplit, column: str, num_labels: int | None) -> Labels:
    """Return one vector per row, and their length."""
    vectors = read_vectors(split, column)
    _check_length(f"label column {column!r} of the {split.name} split", len(vectors[0]), num_labels)
    return vectors, len(vectors[0])


def _check_length(what: str, length: int | None, wanted: int | None) -> None:
    if None not in (length, wanted) and length != wanted:
        raise DataError(
            f"{what} must hold vectors of {wanted} numbers, got {length}: use vectors as long as "
            "the model's hidden size, for all splits."
        )


def encode(split: RawSplit, config: DataConfig, tokenizer: Any) -> tuple[dict[str, Any], int]:
    """Return the model's inputs by name, and the number of truncated rows."""
    texts, pairs = read_texts(split, "data.text", config.text), None
    if config.text_pair is not None:
        pairs = read_texts(split, "data.text_pair", config.text_pair)
    columns, cut = tokenize(texts, pairs, tokenizer, config.max_length)
    refuse_rows(
        split,
        f"column {config.text!r} must hold texts of which the tokenizer makes tokens",
        [(row, texts[row]) for row, ids in enumerate(columns["input_ids"]) if not ids],
        "Remove these rows or fill them in.",
    )
    return columns, cut


def tokenize(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[dict[str, list[Any]], int]:
    """Return the tokenizer's columns of texts or pairs, and the number of truncated rows."""

    def encode(limit: int) -> dict[str, Any]:
        return dict(tokenizer(texts, pairs, truncation=True, max_length=limit))

    columns = encode(max_length + 1)  # shows which rows are longer
    cut = sum(len(ids) > max_length for ids in columns["input_ids"])
    return encode(max_length) if cut else columns, cut


def read_split(
    split: RawSplit,
    config: DataConfig,
    tokenizer: Any,
    num_labels: int | None,
    *,
    read_labels: Callable[[RawSplit, str, int | None], Labels],
) -> Split:
    """Tokenize a split's texts and read its labels with `read_labels`."""
    labels, count = read_labels(split, config.label, num_labels)
    columns, cut = encode(split, config, tokenizer)
    inputs = datasets.Dataset.from_dict({**columns, "labels": labels})
    return Split(inputs=inputs, cut=cut, num_labels=count)


def load_classifier(
    auto_class: Any, source: Source, num_labels: int | None, tokenizer: Any, **head: Any
) -> Any:
    """Return the model with a head for the labels, which knows the tokenizer's padding."""
    model = load_model(auto_class, source, num_labels=num_labels, **head)
    # A decoder's head reads the last token that is no padding.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model


def _load_encoder(source: Source, num_labels: int | None, _tokenizer: Any) -> Any:
    model = load_model(AutoModel, source)
    _check_length("`data.label`", num_labels, model.config.hidden_size)
    model.forward = pooled(model.forward)
    return model


def pooled(forward: Callable[..., Any]) -> Callable[..., SequenceClassifierOutput]:
    """Wrap a forward pass to return the mean hidden state per text."""

    @wraps(forward)
    def with_mean(*args: Any, **kwargs: Any) -> SequenceClassifierOutput:
        hidden = forward(*args, **kwargs).last_hidden_state
        return SequenceClassifierOutput(logits=mean_of_tokens(hidden, kwargs["attention_mask"]))

    return with_mean


def mean_of_tokens(
    hidden: Float[Tensor, "batch tokens size"], mask: Tensor
) -> Float[Tensor, "batch size"]:
    """Return the float32 mean over the tokens whose mask of shape ``(batch, tokens)`` is 1."""
    weights = mask[..., None].float()
    means: Tensor = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
    return means


@torch.no_grad()
def begin_at_mean(model: Any, data: TaskData) -> None:
    """Set the bias of a new head, which is 0, to the mean training label.

    Otherwise labels far from 0 would first distort the pretrained features.
    """
    bias = model.get_submodule(linear_layers(model, head_modules(model))[-1]).bias
    if bias is not None and not bias.any():
        bias.fill_(float(np.mean(data.train["labels"])))


def predict(
    predictor: Predictor,
    split: RawSplit,
    config: DataConfig,
    *,
    describe: Callable[[torch.Tensor], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield `describe(logits)` per row."""
    columns, cut = encode(split, config, predictor.processor)
    warn_of_cut(split, cut, config.max_length)
    inputs = datasets.Dataset.from_dict(columns)
    collator = DataCollatorWithPadding(predictor.processor)
    return map(describe, row_logits(predictor, inputs, collator))


def rounded(values: torch.Tensor) -> list[float]:
    """Return numbers with six decimal places."""
    found: list[float] = np.round(values.double().numpy(), 6).tolist()
    return found


def describe_class(logits: torch.Tensor) -> dict[str, Any]:
    """Return the likeliest class and all probabilities from logits of shape ``(classes,)``."""
    probabilities = logits.softmax(dim=-1)
    return {"prediction": int(probabilities.argmax()), "probabilities": rounded(probabilities)}


def describe_classes(logits: torch.Tensor) -> dict[str, Any]:
    """Return the classes above probability 0.5 and all probabilities from logits ``(classes,)``."""
    return {
        "prediction": (logits > 0).nonzero().flatten().tolist(),
        "probabilities": rounded(logits.sigmoid()),
    }


load_text_model = partial(load_classifier, AutoModelForSequenceClassification)
SEQUENCE_CLASSIFICATION = Task(
    peft_type="SEQ_CLS",
    head=head_modules,
    load_processor=lambda source, config: load_tokenizer(source, config.max_length),
    read_split=partial(read_split, read_labels=read_class_labels),
    load_model=partial(load_text_model, problem_type=PROBLEMS["sequence_classification"]),
    check_model=check_length,
    make_trainer=partial(text_trainer, loss=summed_cross_entropy, metrics=classification_metrics),
    predict=partial(predict, describe=describe_class),
)
REGRESSION = replace(
    SEQUENCE_CLASSIFICATION,
    read_split=partial(
        read_split, read_labels=lambda split, column, _: (read_numbers(split, column), 1)
    ),
    load_model=partial(load_text_model, problem_type=PROBLEMS["regression"]),
    begin_head=begin_at_mean,
    make_trainer=partial(text_trainer, loss=summed_squares, metrics=regression_metrics),
    predict=partial(predict, describe=lambda logits: {"prediction": float(logits[0])}),
)
MULTI_LABEL = replace(
    SEQUENCE_CLASSIFICATION,
    read_split=partial(read_split, read_labels=read_list_labels),
    load_model=partial(load_text_model, problem_type=PROBLEMS["multi_label"]),
    make_trainer=partial(text_trainer, loss=summed_binary, metrics=multi_label_metrics),
    predict=partial(predict, describe=describe_classes),
)
EMBEDDING = replace(
    SEQUENCE_CLASSIFICATION,
    peft_type="FEATURE_EXTRACTION",
    head=no_head,
    unread=unread_poolers,
    read_split=partial(read_split, read_labels=read_vector_labels),
    load_model=_load_encoder,
    make_trainer=partial(text_trainer, loss=summed_squares, metrics=embedding_metrics),
    predict=partial(predict, describe=lambda vector: {"prediction": rounded(vector)}),
)
