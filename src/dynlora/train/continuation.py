"""Greedy generation with a causal language model."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from dynlora.train.task import Predictor


@torch.no_grad()
def continuations(
    predictor: Predictor, prompts: Sequence[list[int]], max_new_tokens: int
) -> Iterator[str]:
    """Yield the generated text per prompt, without special tokens.

    Args:
        predictor: Model, tokenizer and batch size.
        prompts: Token ids per prompt.
        max_new_tokens: Maximum generated tokens per prompt.
    """
    model, tokenizer = predictor.model.eval(), predictor.processor
    settings = greedy(model, tokenizer, max_new_tokens)
    device = next(model.parameters()).device
    for start in range(0, len(prompts), predictor.batch_size):
        batch = prompts[start : start + predictor.batch_size]
        ids, mask = pad_left(batch, tokenizer.pad_token_id)
        written = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        yield from tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)


def greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Return settings for greedy decoding that stop at the tokenizer's or model's stop tokens."""
    stops = model.generation_config.eos_token_id
    known = stops if isinstance(stops, list) else [stops]
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        # `generate` reads unset values from the model's own generation config.
        num_return_sequences=1,
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *known} - {None}),
    )


def pad_left(rows: Sequence[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded token ids and the attention mask, both ``(rows, longest)``."""
    length = max(map(len, rows))
    ids = [[padding] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
