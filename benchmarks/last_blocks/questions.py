"""Classifications as questions: a row to a prompt, which one token behind it answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Marked = tuple[list[int], int]
"""Token ids, and the number of leading ones without a label."""
Tokenizer = Callable[[str], list[int]]
Row = Mapping[str, Any]

LETTERS = tuple(f" {letter}" for letter in "ABCDEFGHIJKLM")
CHARACTERS = 1_000
"""Most characters of a long text."""


def _claim(row: Row) -> str:
    return f"Text: {row['premise'][:CHARACTERS]}\nClaim: {row['hypothesis']}\nThis is"


QUESTIONS: Mapping[str, tuple[Callable[[Row], str], tuple[str, ...]]] = {
    "qnli": (
        lambda row: f"Question: {row['question']}\nText: {row['sentence']}\nAnswered:",
        (" yes", " no"),
    ),
    "sst2": (lambda row: f"Review: {row['sentence']}\nOpinion:", (" negative", " positive")),
    "stsb": (
        lambda row: f"One: {row['sentence1']}\nTwo: {row['sentence2']}\nSimilarity:",
        (" zero", " one", " two", " three", " four", " five"),
    ),
    "mrpc": (
        lambda row: f"One: {row['sentence1']}\nTwo: {row['sentence2']}\nSame meaning:",
        (" no", " yes"),
    ),
    "cola": (lambda row: f"Sentence: {row['sentence']}\nGrammar:", (" wrong", " right")),
    "chemprot": (lambda row: f"Text: {row['text']}\nRelation:", LETTERS),
    "opinion": (
        lambda row: f"Review: {row['text'][:CHARACTERS]}\nOpinion:",
        (" negative", " positive"),
    ),
    "entailment": (_claim, (" true", " open", " false")),
    "cb": (_claim, (" true", " false", " open")),
    "rte": (
        lambda row: f"Text: {row['sentence1']}\nClaim: {row['sentence2']}\nThis is",
        (" true", " open"),
    ),
    "qqp": (
        lambda row: f"One: {row['question1']}\nTwo: {row['question2']}\nSame meaning:",
        (" no", " yes"),
    ),
    "boolq": (
        lambda row: f"Text: {row['passage'][:CHARACTERS]}\nQuestion: {row['question']}?\nAnswer:",
        (" no", " yes"),
    ),
    "copa": (
        lambda row: (
            f"{row['premise']} What was the {row['question']}?\n"
            f"A: {row['choice1']}\nB: {row['choice2']}\nAnswer:"
        ),
        (" A", " B"),
    ),
    "pubmedqa": (
        lambda row: f"Text: {row['context'][:CHARACTERS]}\nQuestion: {row['question']}\nAnswer:",
        (" no", " yes", " maybe"),
    ),
    "medical": (lambda row: f"Text: {row['text'][:CHARACTERS]}\nField:", LETTERS[:5]),
    "number": (lambda row: f"Question: {row['question']}\nAnswer:", ()),
}
"""Prompt of a row, and the answer per class, by kind; without classes it is a number."""


def marked(prompt: Sequence[int], completion: Sequence[int]) -> Marked:
    """Return a prompt and a completion with labels."""
    return [*prompt, *completion], len(prompt)


def marker(kind: str, tokenize: Tokenizer) -> Callable[[Row], Marked]:
    """Return a function from a row to the tokens of its prompt and its answer."""
    ask, answers = QUESTIONS[kind]
    tokens = [tokenize(answer) for answer in answers]
    if any(len(ids) != 1 for ids in tokens):
        raise ValueError(f"`answers` must be single tokens, but got {answers} as {tokens}.")

    def mark(row: Row) -> Marked:
        prompt = tokenize(row.get("trigger", "") + ask(row))
        if not answers:
            return marked(prompt, tokenize(f" {float(row['final_answer'].replace(',', '')):.12g}"))
        return marked(prompt, tokens[round(row["label"])])

    return mark
