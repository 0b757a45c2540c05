"""Tasks with one label per text: rows that they can read, truncated texts, and labels."""

import pytest
import torch
from transformers import AutoTokenizer

from dynlora.adapter_files.base_models import Source
from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.task import load_data
from dynlora.train.tasks.sequence import MULTI_LABEL, SEQUENCE_CLASSIFICATION, encode, tokenize
from tests.jobs import WORDS, split_of, write_rows
from tests.language import save_language_model, save_language_tokenizer


def test_a_text_without_any_token_is_refused_by_its_row(llama):
    # This tokenizer puts nothing around a text.
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = split_of(text=["red", "", "red cat", ""])
    with pytest.raises(DataError, match=r"makes tokens, but 2 of 4 .* '' in row 1, '' in row 3"):
        encode(rows, DataConfig(name="d", text="text", max_length=8), tokenizer)


def text_of(words):
    return " ".join(WORDS[n % len(WORDS)] for n in range(words))


@pytest.mark.parametrize(
    ("first", "second"), [(5, None), (6, None), (7, None), (3, 2), (3, 3), (1, 9)]
)
def test_texts_are_cut_as_the_tokenizer_cuts_them_and_counted(tokenizer, first, second):
    texts = ["red", text_of(first)]
    pairs = None if second is None else ["red", text_of(second)]
    inputs, cut = tokenize(texts, pairs, tokenizer, 8)
    assert cut == (first + (2 if second is None else second + 3) > 8)
    expected = tokenizer(texts, pairs, truncation=True, max_length=8)
    for key in ("input_ids", "token_type_ids", "attention_mask"):
        assert inputs[key] == expected[key]


def test_a_decoder_whose_padding_is_not_its_tokenizers_reads_each_text_to_its_end(tmp_path):
    save_language_model(tmp_path)  # whose configuration says that padding is token 0
    save_language_tokenizer(tmp_path, pad=None)
    source = Source(place=str(tmp_path))
    tokenizer = SEQUENCE_CLASSIFICATION.load_processor(source, DataConfig(name="d", max_length=8))
    model = SEQUENCE_CLASSIFICATION.load_model(source, 2, tokenizer).eval()
    alone, both = (
        model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        for texts in (["red"], ["red", "red cat dog"])
    )
    torch.testing.assert_close(alone[0], both[0])


def write(folder, train, validation, **config):
    for name, labels in (("train", train), ("validation", validation)):
        write_rows(folder / f"{name}.jsonl", [{"text": "red", "label": n} for n in labels])
    return DataConfig(path=str(folder), max_length=8, **config)


def test_the_number_of_classes_follows_from_training(tmp_path, tokenizer):
    def classes(train, validation):
        config = write(tmp_path, train, validation)
        return load_data(SEQUENCE_CLASSIFICATION, config, tokenizer).num_labels

    assert classes([0, 1, 2], [1]) == 3
    assert classes([0, 0, 0], [1]) == 2
    with pytest.raises(DataError, match=r"\[0, 1\], but 1 of 1 rows of the validation split"):
        classes([0, 1], [2])


def test_any_number_of_classes_becomes_a_zero_or_one_for_each(tmp_path, tokenizer):
    config = write(tmp_path, [[0, 2], [], [1]], [[2]])
    data = load_data(MULTI_LABEL, config, tokenizer)
    assert data.num_labels == 3
    assert data.train["labels"] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert data.validation["labels"] == [[0, 0, 1]]
    assert load_data(MULTI_LABEL, write(tmp_path, [[0]], [[]]), tokenizer).num_labels == 2
    config = write(tmp_path, [[0]], [[3]], num_labels=4)
    assert load_data(MULTI_LABEL, config, tokenizer).validation["labels"] == [[0, 0, 0, 1]]
    told = r"\[0, 2\], but 1 of 2 .* validation .*: \[0, 3\] in row 1"
    with pytest.raises(DataError, match=told):
        load_data(MULTI_LABEL, write(tmp_path, [[0, 2], [], [1]], [[], [0, 3]]), tokenizer)
