"""Compare continuations of an engine and PEFT: count equal ones, and explain the others.

Pure Python, so that the verdict can be tested.
"""

from collections.abc import Sequence
from typing import Any

NEAR_TIE = 1e-3
"""Lead in logits below which rounding may choose another token: several times the difference of log
probabilities between PEFT and an engine, which is about 2e-4 in float32."""
ENOUGH = 19 / 20
"""Minimum part of prompts with equal continuations."""


def compare(
    reference: Sequence[dict[str, Any]], engine: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return how an engine's continuations agree with PEFT's.

    Args:
        reference: Per prompt `tokens`, `logprobs`, `runner_up` and `gaps`.
        engine: Per prompt `tokens` and `logprobs`, in the same order. Tokens end with the token
            that ends a text, or at the length that was asked for.

    Returns:
        `prompts`, `equal`, `passed`, `logprob_difference` (the largest of the tokens before any
        difference) and `differences`, one per prompt that differs.

    Raises:
        ValueError: If the numbers of prompts differ.
    """
    if len(reference) != len(engine):
        raise ValueError(
            f"Both must continue the same prompts, got {len(reference)} and {len(engine)}."
        )
    pairs = list(zip(reference, engine, strict=True))
    places = [first_difference(ours["tokens"], theirs["tokens"]) for ours, theirs in pairs]
    differences = [
        {"prompt": index, **_difference(*pairs[index], place)}
        for index, place in enumerate(places)
        if place is not None
    ]
    equal = places.count(None)
    return {
        "prompts": len(places),
        "equal": equal,
        "passed": equal >= ENOUGH * len(places) and all(d["near_tie"] for d in differences),
        "logprob_difference": max(
            _logprob_difference(*pair, place) for pair, place in zip(pairs, places, strict=True)
        ),
        "differences": differences,
    }


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the first place where two continuations differ, None if nowhere.

    If one continuation is the beginning of the other, this is its length.
    """
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _logprob_difference(ours: dict[str, Any], theirs: dict[str, Any], place: int | None) -> float:
    """Return the largest difference over tokens that both chose after the same text."""
    pairs = list(zip(ours["logprobs"], theirs["logprobs"], strict=False))[:place]
    return max((abs(a - b) for a, b in pairs), default=0.0)


def _difference(ours: dict[str, Any], theirs: dict[str, Any], place: int) -> dict[str, Any]:
    """Return the choices of PEFT and the engine, and whether rounding explains them."""
    if place >= min(len(ours["tokens"]), len(theirs["tokens"])):  # one of them stopped short
        return {"place": place, "near_tie": False}
    chosen = theirs["tokens"][place]
    gap = ours["gaps"][place]
    return {
        "place": place,
        "peft": ours["tokens"][place],
        "engine": chosen,
        "gap": gap,
        "near_tie": gap < NEAR_TIE and chosen == ours["runner_up"][place],
    }
