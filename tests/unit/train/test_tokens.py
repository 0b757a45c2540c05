"""Texts to tokens: where they are cut, and how many were."""

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynlora.train.data.tokens import tokenize, tokenize_words
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


def test_each_word_knows_where_its_first_token_is(tokenizer: PreTrainedTokenizerBase) -> None:
    words = [["red", "big-old", "cat"], ["dog"], ["red", "", "cat"]]
    columns, starts, cut = tokenize_words(words, tokenizer, 8)
    # [CLS] red big - old cat [SEP]
    assert starts == [[1, 2, 5], [1], [1, None, 2]]
    assert cut == 0
    assert columns["input_ids"][0] == tokenizer("red big - old cat")["input_ids"]
    assert [len(ids) for ids in columns["input_ids"]] == [7, 3, 4]


@pytest.mark.parametrize("count", range(4, 11))
def test_words_that_were_cut_off_have_no_place(
    tokenizer: PreTrainedTokenizerBase, count: int
) -> None:
    words = text_of(count).split()
    columns, starts, cut = tokenize_words([["red"], words], tokenizer, 8)
    assert cut == (count + 2 > 8)
    kept = min(count, 6)
    assert starts == [[1], [*range(1, kept + 1), *[None] * (count - kept)]]
    assert columns["input_ids"][1] == tokenizer(text_of(kept))["input_ids"]


def test_words_of_a_byte_level_vocabulary_keep_the_space_before_them() -> None:
    vocabulary = {"[UNK]": 0, "red": 1, "Ġcat": 2, "cat": 3, "Ġred": 4}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    columns, starts, _ = tokenize_words([["red", "cat", "red"]], tokenizer, 8)
    assert columns["input_ids"] == [[1, 2, 4]]
    assert starts == [[0, 1, 2]]


def test_a_token_that_spans_words_belongs_to_the_first() -> None:
    plain = Tokenizer(WordLevel({"[UNK]": 0, "new york": 1, "is": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = Split(Regex("new york|is"), "removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    columns, starts, _ = tokenize_words([["is", "new", "york", "is"]], tokenizer, 8)
    assert columns["input_ids"] == [[2, 1, 2]]
    assert starts == [[0, 1, None, 2]]
