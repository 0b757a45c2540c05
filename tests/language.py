"""A tiny causal language model on disk and texts that it can learn, for tests of `causal_lm`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.jobs import job_values, write_rows

WORDS = ("red", "green", "blue", "round", "square", "big", "small", "old", "new", "cat", "dog")
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<turn>", "<end>")
PIECES = ("user", "assistant", "system", "dummy", " ", "\n", ".")
"""Also the word by which TRL tries templates."""
MAX_POSITIONS = 64

CHAT = (
    "{% for message in messages %}{{ '<turn>' + message['role'] + '\n' + message['content'] "
    "+ '<end>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}"
    "{% endif %}"
)
"""A template that writes each turn alike, without markers, and is none that TRL knows."""
MARKED = (
    "{% for message in messages %}{{ '<turn>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<end>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<end>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
"""The same template with markers around what the assistant says."""
FORGETFUL = CHAT.replace("message['content'] ", "(message['content'] if loop.last else '.') ")
"""A template that writes a turn in another way once more follows."""

TALK = [
    {"role": "system", "content": "old"},
    {"role": "user", "content": "red"},
    {"role": "assistant", "content": "green blue"},
    {"role": "user", "content": "cat"},
    {"role": "assistant", "content": "dog"},
]
"""A conversation with two turns of the assistant."""


def save_language_model(
    folder: Path, *, template: str | None = CHAT, seed: int = 0, hidden: int = 32
) -> Path:
    """Save a random Llama of two blocks, and a tokenizer of words and single spaces."""
    torch.manual_seed(seed)
    vocabulary = (*SPECIAL, *PIECES, *WORDS)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.06,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_language_tokenizer(folder, template=template)
    return folder


def save_language_tokenizer(
    folder: Path,
    *,
    template: str | None = CHAT,
    end: str | None = "<eos>",
    pad: str | None = "<pad>",
) -> None:
    """Save a tokenizer that takes each word, space and line break as a token."""
    words = {word: place for place, word in enumerate((*SPECIAL, *PIECES, *WORDS))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(pattern=" ", behavior="isolated")
    tokenizer.add_special_tokens([*SPECIAL])
    tokenizer.add_tokens(["\n", "."])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=end,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    made.save_pretrained(folder)


def make_pairs(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows in all formats: the right answer to some words is the first of them, twice."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, 5, (1,), generator=generator))
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        words = [WORDS[pick] for pick in picks]
        asked, told = " ".join(words), f"{words[0]} {words[0]}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
        rows.append({"ask": asked, "tell": told, "text": f"{asked}\n{told}", "chat": messages})
        rows[-1] |= {"chosen": told, "rejected": f"{words[-1]} dog cat"}
    return rows


def write_pairs(folder: Path, *, train: int = 48, validation: int = 16) -> Path:
    """Write a training and a validation split."""
    write_rows(folder / "train.jsonl", make_pairs(train, seed=1))
    write_rows(folder / "validation.jsonl", make_pairs(validation, seed=2))
    return folder


def write_two_splits(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the same rows as both splits."""
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


FORMATS: Mapping[str, Mapping[str, Any]] = {
    "text": {},
    "pairs": {"prompt": "ask", "completion": "tell"},
    "as_chat": {"prompt": "ask", "completion": "tell", "as_chat": True},
    "messages": {"messages": "chat"},
}
"""By format, the keys of section `data` that name it."""


def language_job(model: Path, data: Path, output: Path, form: str = "pairs") -> dict[str, Any]:
    """Return the configuration of a job of 12 steps in two epochs, whose ranks can move."""
    values = job_values(model, data, output) | {"task": "causal_lm"}
    values["data"] |= {"max_length": 48, "max_new_tokens": 6, **FORMATS[form]}
    return values
