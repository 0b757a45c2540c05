"""The causal language modelling task: what is read in each format, and what is predicted."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from dynlora.adapter_files.base_models import Source
from dynlora.errors import ConfigError, DataError
from dynlora.train.config import DataConfig
from dynlora.train.task import Predictor
from dynlora.train.tasks.causal_lm import CAUSAL_LM, continuations, greedy
from tests.jobs import split_of
from tests.language import (
    FORMATS,
    MAX_POSITIONS,
    make_pairs,
    save_language_model,
    save_language_tokenizer,
)

ROWS = make_pairs(6)


@pytest.fixture
def tokenizer(llama):
    return CAUSAL_LM.load_processor(Source(place=str(llama)), config())


def config(**values):
    return DataConfig(path="data", **{"max_length": 48, **values})


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def read(rows, tokenizer, **values):
    return CAUSAL_LM.read_split(split_of(**columns(rows)), config(**values), tokenizer, None)


def words(tokenizer, ids):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


TURNS = "<turn>user\n{ask}<end>\n<turn>assistant\n", "{tell}<end>\n"
PARTS = {
    "text": ("", "{ask}\n{tell}<eos>"),
    "pairs": ("{ask}\n", "{tell}<eos>"),
    "as_chat": TURNS,
    "messages": TURNS,
}
"""By format, the part of a row that is known and the part that is learned."""


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_each_format_gives_its_text_and_learns_its_part(tokenizer, form, only):
    split = read(ROWS, tokenizer, **FORMATS[form], completion_only=only)
    assert (split.num_labels, split.cut) == (None, 0)
    known, learned = PARTS[form]
    for row, given in zip(split.inputs, ROWS, strict=True):
        assert words(tokenizer, row["input_ids"]) == (known + learned).format(**given)
        kept = [token for token in row["labels"] if token != -100]
        if known and only:
            assert words(tokenizer, kept) == learned.format(**given)
        else:
            assert kept == row["input_ids"][1:]
        assert row["labels"][-len(kept) :] == kept


def test_a_length_within_which_nothing_is_learned_is_refused(tokenizer):
    rows = [{"ask": " ".join(["red"] * 8), "tell": "cat"}] * 2
    with pytest.raises(DataError, match=r"all 2 were left out: within data.max_length=8 .* Raise"):
        read(rows, tokenizer, **FORMATS["pairs"], max_length=8)


@pytest.mark.parametrize(
    ("form", "saved", "told"),
    [
        ("as_chat", {"template": None}, r"`data\.as_chat` needs a model with a chat template"),
        ("messages", {"template": None}, r"`data\.messages` needs a model with a chat template"),
        ("text", {"end": None}, r"must have an end-of-text token.*add `eos_token`"),
    ],
)
def test_a_tokenizer_that_a_format_cannot_use_is_refused(tmp_path, form, saved, told):
    save_language_model(tmp_path, template=None)
    save_language_tokenizer(tmp_path, **{"template": None} | saved)
    with pytest.raises(ConfigError, match=told):
        CAUSAL_LM.load_processor(Source(place=str(tmp_path)), config(**FORMATS[form]))


@pytest.mark.parametrize("form", FORMATS)
def test_predictions_go_on_from_what_comes_before_the_completion(
    llama, tokenizer, form, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(llama)
    seen, generate = [], model.generate

    def spy(**given):
        ids = given["input_ids"][given["attention_mask"].bool()]
        seen.append(words(tokenizer, ids.tolist()))
        return generate(**given)

    monkeypatch.setattr(model, "generate", spy)
    predictor = Predictor(model=model, processor=tokenizer, batch_size=1)
    given = config(**FORMATS[form], max_new_tokens=3)
    predicted = list(CAUSAL_LM.predict(predictor, split_of(**columns(ROWS[:3])), given))
    known = PARTS[form][0] or "{text}"
    assert seen == [known.format(**row) for row in ROWS[:3]]
    assert [[*map(type, row.values())] for row in predicted] == [[str]] * 3


@pytest.mark.parametrize(
    "limits", [{"max_length": 8, "max_new_tokens": 3}, {"max_new_tokens": MAX_POSITIONS - 8}]
)
def test_of_a_long_prompt_the_end_is_read_with_room_for_the_answer(llama, tokenizer, limits):
    model = AutoModelForCausalLM.from_pretrained(llama)
    predictor = Predictor(model=model, processor=tokenizer, batch_size=2)
    given = config(**FORMATS["pairs"], **limits)
    rows = [{"ask": "old old red cat dog dog"}, {"ask": "new red cat dog dog"}]
    first, second = CAUSAL_LM.predict(predictor, split_of(**columns(rows)), given)
    assert first == second, "the last 8 tokens are the same"


PROMPTS = [[6, 9, 7], [12], [13, 9, 15, 9, 18, 10], [20, 9, 20]]


def likeliest(model, prompt, count):
    """Return greedy tokens up to the end of the text, by one plain forward each."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(("batch_size", "count"), [(1, 2), (3, 7)])
def test_each_token_is_the_likeliest_in_any_batch_and_for_any_model(
    llama, tokenizer, batch_size, count
):
    model = AutoModelForCausalLM.from_pretrained(llama)
    used = Predictor(model=model, processor=tokenizer, batch_size=batch_size)
    found = [likeliest(model, prompt, count) for prompt in PROMPTS]
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
    assert any(expected)
    assert list(continuations(used, PROMPTS, count)) == expected
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=2.0, top_p=0.5, repetition_penalty=5.0, eos_token_id=3
    )
    assert list(continuations(used, PROMPTS, count)) == expected, "its wishes are not followed"


def test_writing_stops_at_the_ends_of_tokenizer_model_and_chat_template(llama, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(llama)
    used = Predictor(model=model, processor=tokenizer, batch_size=2)
    first = likeliest(model, PROMPTS[0], 1)
    model.generation_config.eos_token_id = first
    assert greedy(model, tokenizer, 4).eos_token_id == sorted({3, 5, *first})
    expected = tokenizer.decode(first, skip_special_tokens=True)
    assert next(continuations(used, PROMPTS[:1], 7)) == expected
