"""Embedding regression: fit the mean of the last hidden states to one vector per text.

For example, to distill a large embedding model, or to repair a pruned or quantized one.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput

from dynlora.errors import DataError
from dynlora.train.data.columns import read_vectors
from dynlora.train.data.splits import RawSplit
from dynlora.train.loss import summed_squares
from dynlora.train.methods.full_modules import unread_poolers
from dynlora.train.pretrained import Source, check_length, load_model
from dynlora.train.task import Task
from dynlora.train.tasks.metrics import embedding_metrics
from dynlora.train.tasks.sequence import load_processor, predict, read_split, rounded, text_trainer


def read_vector_labels(
    split: RawSplit, column: str, num_labels: int | None
) -> tuple[list[list[float]], int]:
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


def _load_model(source: Source, num_labels: int | None, _tokenizer: Any) -> Any:
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


EMBEDDING = Task(
    peft_type="FEATURE_EXTRACTION",
    unread=unread_poolers,
    load_processor=load_processor,
    read_split=partial(read_split, read_labels=read_vector_labels),
    load_model=_load_model,
    check_model=check_length,
    make_trainer=partial(text_trainer, loss=summed_squares, metrics=embedding_metrics),
    predict=partial(predict, describe=lambda vector: {"prediction": rounded(vector)}),
)
