"""Token classification: one class per word, predicted at the word's first token."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import datasets
from tokenizers import Encoding
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
)

from dynlora.adapter_files.base_models import Source
from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import UNLABELLED, read_class_lists, read_words, refuse_rows
from dynlora.train.data.splits import RawSplit
from dynlora.train.methods.full_modules import head_modules
from dynlora.train.pretrained import check_length, load_tokenizer
from dynlora.train.task import Predictor, Split, Task, row_logits, warn_of_cut
from dynlora.train.tasks.metrics import summed_cross_entropy, token_metrics
from dynlora.train.tasks.sequence import load_classifier
from dynlora.train.trainer import make_job_trainer


def _load_processor(source: Source, config: DataConfig) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(source, config.max_length)
    if not tokenizer.is_fast:
        raise ConfigError(
            "`task: token_classification` needs a fast tokenizer, which knows what a token "
            f"stands for, got {type(tokenizer).__name__} from {source.place}: save the tokenizer "
            "with a tokenizer.json beside the model."
        )
    tokenizer.padding_side = "right"  # token indices must not depend on the batch
    return tokenizer


def _read_split(
    split: RawSplit, config: DataConfig, tokenizer: Any, num_labels: int | None
) -> Split:
    words = read_words(split, config.text)
    classes = read_class_lists(split, config.label, num_labels)
    pairs = [(len(row), len(these)) for row, these in zip(classes, words, strict=True)]
    refuse_rows(
        split,
        f"label column {config.label!r} must hold one class for each word in {config.text!r}",
        [(row, pair) for row, pair in enumerate(pairs) if pair[0] != pair[1]],
        "Mend these rows or remove them.",
        lambda pair: f"{pair[0]} for {pair[1]}",
    )
    columns, starts, cut = tokenize_words(words, tokenizer, config.max_length)
    refuse_rows(
        split,
        f"column {config.text!r} must hold words of which the tokenizer makes tokens",
        [(row, words[row]) for row, places in enumerate(starts) if set(places) == {None}],
        "Remove these rows.",
    )
    labels = []
    for ids, places, row in zip(columns["input_ids"], starts, classes, strict=True):
        at_place = dict(zip(places, row, strict=True))
        labels.append([at_place.get(place, UNLABELLED) for place in range(len(ids))])
    count = num_labels or split.count_classes(max(map(max, classes)))
    inputs = datasets.Dataset.from_dict({**columns, "labels": labels})
    return Split(inputs=inputs, cut=cut, num_labels=count)


def tokenize_words(
    words: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[dict[str, list[Any]], list[list[int | None]], int]:
    """Return the tokenizer's columns, the first token per row and word, and the truncated rows.

    Words are joined with spaces, because many vocabularies include the space before a word. A word
    that was truncated or has no token of its own has no first token (None).
    """
    texts = [" ".join(row) for row in words]
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    starts = [
        _first_tokens(encoding, row)
        for encoding, row in zip(encoded.encodings or (), words, strict=True)
    ]
    cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings or ())
    return dict(encoded), starts, cut


def _first_tokens(encoding: Encoding, words: Sequence[str]) -> list[int | None]:
    places: list[int | None] = []
    begin = 0
    for word in words:
        tokens = map(encoding.char_to_token, range(begin, begin + len(word)))
        first = next((token for token in tokens if token is not None), None)
        places.append(None if first in places else first)
        begin += len(word) + 1
    return places


def _predict(predictor: Predictor, split: RawSplit, config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield one class per word, null if the word was truncated or has no token."""
    words = read_words(split, config.text)
    columns, starts, cut = tokenize_words(words, predictor.processor, config.max_length)
    warn_of_cut(split, cut, config.max_length)
    inputs = datasets.Dataset.from_dict(columns)
    rows = row_logits(predictor, inputs, DataCollatorForTokenClassification(predictor.processor))
    for logits, places in zip(rows, starts, strict=True):
        guesses = logits.argmax(dim=-1).tolist()
        yield {"prediction": [None if at is None else guesses[at] for at in places]}


TOKEN_CLASSIFICATION = Task(
    peft_type="TOKEN_CLS",
    head=head_modules,
    load_processor=_load_processor,
    read_split=_read_split,
    load_model=partial(load_classifier, AutoModelForTokenClassification),
    check_model=check_length,
    make_trainer=partial(
        make_job_trainer,
        loss=summed_cross_entropy,
        metrics=token_metrics,
        collate=DataCollatorForTokenClassification,
    ),
    predict=_predict,
)
