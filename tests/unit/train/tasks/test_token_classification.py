"""Words and their classes to model inputs, and logits back to one class a word."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import PreTrainedTokenizerFast

from dynlora.adapter_files.base_models import Source
from dynlora.errors import ConfigError, DataError
from dynlora.train.config import DataConfig
from dynlora.train.task import Predictor
from dynlora.train.tasks.token_classification import TOKEN_CLASSIFICATION as TASK
from dynlora.train.tasks.token_classification import tokenize_words
from tests.jobs import split_of

CONFIG = DataConfig(name="d", max_length=8)


def test_the_first_token_of_each_word_that_is_kept_has_its_class(tokenizer):
    words = [["red", "big-old", "cat"], ["red", "", "cat"], ["red"] * 6, ["red"] * 7]
    rows = split_of(text=words, label=[[0, 2, 1], [1, 1, 0], [1] * 6, [1] * 7])
    found = TASK.read_split(rows, CONFIG, tokenizer, None)
    assert found.inputs["input_ids"][0] == tokenizer("red big - old cat")["input_ids"]
    assert found.inputs["labels"] == [
        [-100, 0, 2, -100, -100, 1, -100],  # [CLS] red big - old cat [SEP]
        [-100, 1, 0, -100],
        [-100, *[1] * 6, -100],
        [-100, *[1] * 6, -100],
    ]
    assert (found.cut, found.num_labels) == (1, 3)
    assert TASK.read_split(rows, CONFIG, tokenizer, 4).num_labels == 4


def test_rows_of_other_words_than_classes_or_without_tokens_are_named(tokenizer):
    for text, label, told in (
        ([["a", "b"]] * 2, [[0, 1], [0, 1, 1]], r"'text', but 1 of 2 .*: 3 for 2 in row 1\. Mend"),
        ([["red"], ["", " "]], [[0], [1, 1]], r"makes tokens, but 1 of 2 .*: \['', ' '\] in row 1"),
    ):
        with pytest.raises(DataError, match=told):
            TASK.read_split(split_of(text=text, label=label), CONFIG, tokenizer, None)


def test_a_tokenizer_that_does_not_know_words_is_refused(monkeypatch):
    monkeypatch.setattr(
        "dynlora.train.tasks.token_classification.load_tokenizer",
        lambda source, length: SimpleNamespace(is_fast=False),
    )
    with pytest.raises(ConfigError, match=r"needs a fast tokenizer.* with a tokenizer\.json"):
        TASK.load_processor(Source(place="m"), CONFIG)


def test_each_word_gets_the_likeliest_class_of_its_first_token(tokenizer):
    class Echo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(len(tokenizer)))

        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=self.weight[input_ids])

    number = tokenizer.convert_tokens_to_ids
    rows = split_of(text=[["red", "big-old", "cat"], ["dog"], ["", *["cat"] * 9], ["new"]])
    predictor = Predictor(model=Echo(), processor=tokenizer, batch_size=2)
    found = list(TASK.predict(predictor, rows, CONFIG))
    assert found == [
        {"prediction": [number("red"), number("big"), number("cat")]},
        {"prediction": [number("dog")]},
        {"prediction": [None, *[number("cat")] * 6, None, None, None]},
        {"prediction": [number("new")]},
    ]


def words_only(vocabulary, splits):
    plain = Tokenizer(WordLevel({"[UNK]": 0} | vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = splits
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")


def test_words_of_a_byte_level_vocabulary_keep_the_space_before_them():
    vocabulary = {"red": 1, "Ġcat": 2, "cat": 3, "Ġred": 4}
    tokenizer = words_only(vocabulary, ByteLevel(add_prefix_space=False))
    columns, starts, _ = tokenize_words([["red", "cat", "red"]], tokenizer, 8)
    assert columns["input_ids"] == [[1, 2, 4]]
    assert starts == [[0, 1, 2]]


def test_a_token_that_spans_words_belongs_to_the_first():
    splits = Split(Regex("new york|is"), "removed", invert=True)
    tokenizer = words_only({"new york": 1, "is": 2}, splits)
    columns, starts, _ = tokenize_words([["is", "new", "york", "is"]], tokenizer, 8)
    assert columns["input_ids"] == [[2, 1, 2]]
    assert starts == [[0, 1, None, 2]]
