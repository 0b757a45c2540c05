"""Texts to tokens: where they are cut, and how many were."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynlora.train.tokens import tokenize
from tests.jobs import WORDS, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def text_of(words: int) -> str:
    return " ".join(WORDS[n % len(WORDS)] for n in range(words))


@pytest.mark.parametrize("words", range(3, 13))
def test_a_text_is_cut_exactly_where_it_is_longer_than_the_limit(
    tokenizer: PreTrainedTokenizerBase, words: int
) -> None:
    texts = ["red", text_of(words)]
    inputs, cut = tokenize(texts, None, tokenizer, 8)
    assert cut == (words + 2 > 8)
    assert [len(ids) for ids in inputs["input_ids"]] == [3, min(words + 2, 8)]
    expected = tokenizer(texts, truncation=True, max_length=8)
    assert inputs["input_ids"] == expected["input_ids"]
    assert inputs["attention_mask"] == expected["attention_mask"]


@pytest.mark.parametrize(("first", "second"), [(3, 2), (3, 3), (9, 1), (1, 9), (9, 9)])
def test_pairs_are_cut_as_the_tokenizer_cuts_them(
    tokenizer: PreTrainedTokenizerBase, first: int, second: int
) -> None:
    texts, pairs = [text_of(first)], [text_of(second)]
    inputs, cut = tokenize(texts, pairs, tokenizer, 8)
    assert cut == (first + second + 3 > 8)
    expected = tokenizer(texts, pairs, truncation=True, max_length=8)
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert inputs[key] == expected[key]
