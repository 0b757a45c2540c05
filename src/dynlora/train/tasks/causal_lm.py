"""Causal language modelling on texts, prompts with completions, or conversations."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from dynlora.adapter_files.base_models import Source, position_limit
from dynlora.errors import ConfigError, DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import read_prompts, read_texts, refuse_rows
from dynlora.train.data.conversations import (
    as_conversations,
    check_template,
    encode_conversations,
    encode_requests,
    ends_of_turn,
    read_conversations,
    warn_of_unlearned_stop,
)
from dynlora.train.data.language import (
    encode_pairs,
    encode_prompts,
    encode_texts,
    fit,
    joined,
    warn_of_merged,
)
from dynlora.train.data.splits import RawSplit
from dynlora.train.pretrained import check_length, load_model, load_tokenizer
from dynlora.train.task import Predictor, Split, Task, warn_of_cut
from dynlora.train.tasks.sft import make_sft_trainer

Inputs = Mapping[str, torch.Tensor]
TRIED = 1_000  # first rows whose prompts and completions are compared

logger = logging.getLogger(__name__)


def _load_processor(source: Source, config: DataConfig) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(source, config.max_length)
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"the tokenizer of {source.label} must have an end-of-text token, by which a model "
            "learns to stop, got none: add `eos_token` to its tokenizer_config.json."
        )
    if config.messages is not None:
        check_template(tokenizer, "data.messages")
    if config.as_chat:
        check_template(tokenizer, "data.as_chat")
    return tokenizer


def check_answers(split: RawSplit, config: DataConfig, tokenizer: Any) -> None:
    """Check the answers to learn, if not all tokens are learned.

    Raises:
        DataError: If they are all empty, so that the model would only learn to stop.
    """
    column = config.messages or config.completion
    if column is None or not config.completion_only:
        return
    answers = (answer for part in split.parts() for answer in _answers(part, config, column))
    first = next(answers, None)
    if first is not None and not first.strip() and not any(map(str.strip, answers)):
        raise DataError(
            f"column {column!r} must hold an answer to learn in at least one row, but all "
            f"of the {split.name} split ({split.source}) are empty: name the column "
            "that holds the answers, or set `data.completion_only: false` to learn the prompts too."
        )
    if config.messages is not None or config.as_chat:
        warn_of_unlearned_stop(tokenizer)
    elif config.prompt is not None:
        start = split.take(range(min(split.table.num_rows, TRIED)))
        asked = read_prompts(start, config.prompt, config.separator)
        asked = [prompt + config.separator for prompt in asked]
        warn_of_merged(asked, read_texts(start, "data.completion", column), tokenizer, split.name)


def _answers(split: RawSplit, config: DataConfig, column: str) -> list[str]:
    if config.messages is None:
        return read_texts(split, "data.completion", column)
    turns = [message for row in read_conversations(split, column) for message in row]
    return [message["content"] for message in turns if message["role"] == "assistant"]


def encode(split: RawSplit, config: DataConfig, tokenizer: Any) -> Any:
    """Return a `datasets.Dataset` of a split's tokens and labels, before truncation."""
    only = config.completion_only
    if config.messages is not None:
        conversations = read_conversations(split, config.messages)
        return encode_conversations(split, conversations, tokenizer, completion_only=only)
    if config.prompt is None or config.completion is None:
        return encode_texts(read_texts(split, "data.text", config.text), tokenizer)
    prompts = read_prompts(split, config.prompt, config.separator)
    completions = read_texts(split, "data.completion", config.completion)
    if config.as_chat:
        conversations = as_conversations(prompts, completions)
        return encode_conversations(split, conversations, tokenizer, completion_only=only)
    prompts = [prompt + config.separator for prompt in prompts]
    if not only:
        whole = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
        return encode_texts(whole, tokenizer)
    return encode_pairs(prompts, completions, tokenizer)


def _read_split(
    split: RawSplit, config: DataConfig, tokenizer: Any, _num_labels: int | None
) -> Split:
    check_answers(split, config, tokenizer)
    cuts: list[int] = []

    def fitting(part: RawSplit) -> Any:
        rows, cut = fit(encode(part, config, tokenizer), config.max_length)
        cuts.append(cut)
        return rows

    inputs = joined(map(fitting, split.parts()))
    reason = f"within data.max_length={config.max_length} tokens they have nothing to learn"
    check_left(split, len(inputs), reason)
    return Split(inputs=inputs, cut=sum(cuts), num_labels=None)


def check_left(split: RawSplit, kept: int, reason: str) -> None:
    """Warn of rows that teach nothing and were left out; refuse a split of such rows alone."""
    count, name = split.table.num_rows, split.name
    if kept == 0:
        raise DataError(
            f"the {name} split ({split.source}) must hold rows to learn from, but all {count} "
            f"were left out: {reason}. Raise `data.max_length`, or use other rows."
        )
    if kept < count:
        logger.warning("%d of %d %s rows were left out: %s.", count - kept, count, name, reason)


def _predict(predictor: Predictor, split: RawSplit, config: DataConfig) -> Iterator[dict[str, Any]]:
    longest = longest_prompt(predictor.model, config)
    prompts = _prompts(split, config, predictor.processor)
    refuse_rows(
        split,
        "the prompt must have at least one token to go on from in every row",
        [(row, "") for row, ids in enumerate(prompts) if not ids],
        "Remove these rows or fill them in.",
    )
    warn_of_cut(split, sum(len(ids) > longest for ids in prompts), longest)
    # Truncate long prompts on the left: the continuation depends most on the last tokens.
    kept = [ids[-longest:] for ids in prompts]
    for text in continuations(predictor, kept, config.max_new_tokens):
        yield {"prediction": text}


def continuations(
    predictor: Predictor, prompts: Sequence[list[int]], max_new_tokens: int
) -> Iterator[str]:
    """Yield the text generated per prompt of token ids, without special tokens."""
    tokenizer = predictor.processor
    for start in range(0, len(prompts), predictor.batch_size):
        batch = prompts[start : start + predictor.batch_size]
        inputs = tokenizer.pad(
            {"input_ids": batch},
            padding_side="left",
            return_attention_mask=True,
            return_tensors="pt",
        )
        yield from generated(predictor.model, tokenizer, inputs, max_new_tokens)


@torch.no_grad()
def generated(model: Any, tokenizer: Any, inputs: Inputs, max_new_tokens: int) -> list[str]:
    """Return the text generated per left-padded row of model inputs, without special tokens."""
    settings = greedy(model.eval(), tokenizer, max_new_tokens)
    device = next(model.parameters()).device
    moved = {name: value.to(device) for name, value in inputs.items()}
    whole = model.generate(**moved, generation_config=settings)
    new = whole[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)  # type: ignore[no-any-return]


def greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Return settings for greedy decoding that stop at all stop tokens.

    They are the tokenizer's, the model's and the chat template's.
    """
    stops = model.generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    if tokenizer.chat_template is not None:
        known |= ends_of_turn(tokenizer)
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
        eos_token_id=sorted(known),
    )


def longest_prompt(model: Any, config: DataConfig) -> int:
    """Return the maximum prompt length in tokens that leaves room for `data.max_new_tokens`.

    Refuses a model whose context is shorter than `data.max_length`.
    """
    check_length(model, config)
    limit, new = position_limit(model), config.max_new_tokens
    longest = config.max_length if limit is None else min(config.max_length, limit - new)
    if longest < 1:
        raise ConfigError(
            f"`data.max_new_tokens` must leave room for a prompt within the {limit} tokens "
            f"that the model can read, got {new}: lower it, or give "
            "`dynlora predict` another with `--max-new-tokens`."
        )
    return longest


def _prompts(split: RawSplit, config: DataConfig, tokenizer: Any) -> list[list[int]]:
    """Return the prompt tokens per row; completions are not needed."""
    if config.messages is not None:
        conversations = read_conversations(split, config.messages)
        return encode_requests(split, conversations, tokenizer)
    if config.prompt is None:
        return encode_prompts(read_texts(split, "data.text", config.text), tokenizer)
    prompts = read_prompts(split, config.prompt, config.separator)
    if config.as_chat:
        return encode_requests(split, as_conversations(prompts, [""] * len(prompts)), tokenizer)
    return encode_prompts([prompt + config.separator for prompt in prompts], tokenizer)


def _right_answers(split: RawSplit, config: DataConfig) -> list[list[str]]:
    """Return each row's completion, or the last message of the assistant if it ends the row."""
    if config.messages is not None:
        last = [messages[-1] for messages in read_conversations(split, config.messages)]
        return [[turn["content"]] if turn["role"] == "assistant" else [] for turn in last]
    if config.completion is None:
        raise ConfigError(
            "`--exact-match` needs rows with an answer (`data.completion` or `data.messages`), "
            "but the run's rows are whole texts: leave it out."
        )
    return [[text] for text in read_texts(split, "data.completion", config.completion)]


CAUSAL_LM = Task(
    peft_type="CAUSAL_LM",
    load_processor=_load_processor,
    read_split=_read_split,
    load_model=lambda source, _num_labels, _tokenizer: load_model(AutoModelForCausalLM, source),
    check_model=longest_prompt,
    make_trainer=make_sft_trainer,
    predict=_predict,
    answers=_right_answers,
)
