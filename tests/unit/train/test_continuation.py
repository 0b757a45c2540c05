"""Greedy continuations: the same alone and in a batch, and no longer than they should be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dynlora.train.task import Predictor
from dynlora.train.tasks.causal_lm import continuations, greedy
from tests.language import save_language_model

PROMPTS = [[6, 9, 7], [12], [13, 9, 15, 9, 18, 10], [20, 9, 20]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


def predictor(folder: Path, batch_size: int) -> Predictor:
    return Predictor(
        model=AutoModelForCausalLM.from_pretrained(folder),
        processor=AutoTokenizer.from_pretrained(folder),
        batch_size=batch_size,
    )


def likeliest(model: Any, prompt: list[int], count: int) -> list[int]:
    """Return greedy tokens up to the end of the text, by one plain forward each."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_token_is_the_likeliest_whatever_the_batch(folder: Path, batch_size: int) -> None:
    used = predictor(folder, batch_size)
    expected = [
        used.processor.decode(likeliest(used.model, prompt, 7), skip_special_tokens=True)
        for prompt in PROMPTS
    ]
    assert list(continuations(used, PROMPTS, 7)) == expected
    assert any(expected)


def test_a_models_wish_to_sample_is_not_followed(folder: Path) -> None:
    used = predictor(folder, 2)
    plain = list(continuations(used, PROMPTS, 7))
    used.model.generation_config = GenerationConfig(
        do_sample=True, temperature=2.0, top_p=0.5, repetition_penalty=5.0, eos_token_id=3
    )
    assert list(continuations(used, PROMPTS, 7)) == plain


def test_writing_stops_at_the_tokenizers_and_the_models_ends(folder: Path) -> None:
    used = predictor(folder, 2)
    first = likeliest(used.model, PROMPTS[0], 1)
    used.model.generation_config.eos_token_id = [5, *first]
    assert greedy(used.model, used.processor, 4).eos_token_id == sorted({3, 5, *first})
    assert next(continuations(used, PROMPTS[:1], 7)) == used.processor.decode(
        first, skip_special_tokens=True
    )
