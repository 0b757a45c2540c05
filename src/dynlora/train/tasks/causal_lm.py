"""Causal language modelling on texts, prompts with completions, or conversations.

TRL's `SFTTrainer` prepares the rows and trains.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from dynlora.adapter_files.base_models import position_limit
from dynlora.errors import ConfigError, DataError
from dynlora.train.config import DataConfig
from dynlora.train.continuation import continuations
from dynlora.train.data.columns import check_columns, read_texts, refuse_rows
from dynlora.train.data.conversations import (
    as_conversations,
    check_template,
    encode_conversations,
    encode_requests,
    read_conversations,
)
from dynlora.train.data.language import encode_pairs, encode_prompts, encode_texts, fit
from dynlora.train.data.splits import RawSplit
from dynlora.train.pretrained import Source, check_length, load_model, load_tokenizer
from dynlora.train.task import Predictor, Split, Task, TrainerParts
from dynlora.train.tasks.sft import make_sft_trainer

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


def _encode(split: RawSplit, config: DataConfig, tokenizer: Any) -> Any:
    """Return a `datasets.Dataset` of a split's tokens and labels, before truncation."""
    only = config.completion_only
    if config.messages is not None:
        check_columns(split, {"data.messages": config.messages})
        conversations = read_conversations(split, config.messages)
        if only:
            said = [m["content"] for row in conversations for m in row if m["role"] == "assistant"]
            _require_one(split, config.messages, said)
        return encode_conversations(split, conversations, tokenizer, completion_only=only)
    if config.prompt is None or config.completion is None:
        check_columns(split, {"data.text": config.text})
        return encode_texts(read_texts(split, config.text), tokenizer)
    check_columns(split, {"data.prompt": config.prompt, "data.completion": config.completion})
    prompts, completions = read_texts(split, config.prompt), read_texts(split, config.completion)
    if only:
        _require_one(split, config.completion, completions)
    if config.as_chat:
        conversations = as_conversations(prompts, completions)
        return encode_conversations(split, conversations, tokenizer, completion_only=only)
    prompts = [prompt + config.separator for prompt in prompts]
    if not only:
        whole = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
        return encode_texts(whole, tokenizer)
    return encode_pairs(prompts, completions, tokenizer, split.name)


def _require_one(split: RawSplit, column: str, answers: Sequence[str]) -> None:
    """Check that at least one answer is not empty.

    Raises:
        DataError: If all are empty, because the model would only learn to stop.
    """
    if answers and not any(answer.strip() for answer in answers):
        raise DataError(
            f"column {column!r} must hold an answer to learn in at least one row, but all "
            f"{len(answers)} of the {split.name} split ({split.source}) are empty: name the column "
            "that holds the answers, or set `data.completion_only: false` to learn the prompts too."
        )


def _read_split(
    split: RawSplit, config: DataConfig, tokenizer: Any, _num_labels: int | None
) -> Split:
    encoded = _encode(split, config, tokenizer)
    fitted = fit(encoded, config.max_length)
    if fitted.dropped == len(encoded):
        raise DataError(
            f"`data.max_length` must leave something to learn, got {config.max_length} tokens, "
            f"within which none of {len(encoded)} rows of the {split.name} split "
            f"({split.source}) has a token of its completion: raise it."
        )
    if fitted.dropped:
        logger.warning(
            "%d of %d %s rows were left out: within data.max_length=%d tokens they have none of "
            "their completion.",
            fitted.dropped, len(encoded), split.name, config.max_length,
        )  # fmt: skip
    return Split(inputs=fitted.inputs, cut=fitted.cut, num_labels=None)


def _load_model(source: Source, _num_labels: int | None, _tokenizer: Any) -> Any:
    return load_model(AutoModelForCausalLM, source)


def _check_model(model: Any, config: DataConfig) -> None:
    """Check that the longest row, and a prompt with its answer, fit the model's context.

    Raises:
        ConfigError: If they do not fit.
    """
    check_length(model, config)
    _longest_prompt(model, config)


def _make_trainer(parts: TrainerParts) -> Trainer:
    trainer: Trainer = make_sft_trainer(parts)
    return trainer


def _predict(predictor: Predictor, split: RawSplit, config: DataConfig) -> Iterator[dict[str, Any]]:
    longest = _longest_prompt(predictor.model, config)
    prompts = _prompts(split, config, predictor.processor)
    refuse_rows(
        split,
        "the prompt must have at least one token to go on from in every row",
        [(row, "") for row, ids in enumerate(prompts) if not ids],
        "Remove these rows or fill them in.",
    )
    # Truncate long prompts on the left: the continuation depends most on the last tokens.
    kept = [ids[-longest:] for ids in prompts]
    for text in continuations(predictor, kept, config.max_new_tokens):
        yield {"prediction": text}


def _longest_prompt(model: Any, config: DataConfig) -> int:
    """Return the maximum prompt length in tokens that leaves room for `data.max_new_tokens`."""
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
        check_columns(split, {"data.messages": config.messages})
        conversations = read_conversations(split, config.messages)
        return encode_requests(split, conversations, tokenizer)
    if config.prompt is None:
        check_columns(split, {"data.text": config.text})
        return encode_prompts(read_texts(split, config.text), tokenizer)
    check_columns(split, {"data.prompt": config.prompt})
    prompts = read_texts(split, config.prompt)
    if config.as_chat:
        return encode_requests(split, as_conversations(prompts, [""] * len(prompts)), tokenizer)
    return encode_prompts([prompt + config.separator for prompt in prompts], tokenizer)


CAUSAL_LM = Task(
    peft_type="CAUSAL_LM",
    load_processor=_load_processor,
    read_split=_read_split,
    load_model=_load_model,
    check_model=_check_model,
    make_trainer=_make_trainer,
    predict=_predict,
)
