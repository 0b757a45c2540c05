"""Merge and check fragments of a job's configuration."""

from collections.abc import Iterator, Mapping
from typing import Any

from dynlora.errors import ConfigError

Fragment = Mapping[str, Any]
"""Part of a job's configuration, nested as in its YAML file."""

OWN_KEYS = {
    "output": "run folders are temporary: see `--keep-runs`",
    "overwrite": "run folders are temporary: see `--keep-runs`",
    "lora.r": "`budgets` sets it",
    "lora.lora_alpha": "`scale` times the budget is what it will be",
    "training.seed": "`seeds` sets it",
    "dynamic.seed": "`seeds` sets it",
    "training.resume": "every run of a study starts afresh",
}
"""Keys set by the study, with the reason for messages."""


def merge(*fragments: Fragment) -> dict[str, Any]:
    """Merge fragments: sections recursively, other values from the last fragment."""
    merged: dict[str, Any] = {}
    for fragment in fragments:
        for key, value in fragment.items():
            below = merged.get(key)
            both = isinstance(value, Mapping) and isinstance(below, Mapping)
            merged[key] = merge(below or {}, value) if both else value
    return merged


def check_free(fragment: Fragment, place: str) -> None:
    """Check that a fragment does not set keys of the study.

    Args:
        fragment: The fragment.
        place: Its place for messages, such as `methods.lora in rank.yaml`.

    Raises:
        ConfigError: If it sets one of `OWN_KEYS`.
    """
    for key in _dotted(fragment):
        if key in OWN_KEYS:
            raise ConfigError(f"`{key}` must not stand in {place}: {OWN_KEYS[key]}. Leave it out.")


def _dotted(fragment: Fragment, prefix: str = "") -> Iterator[str]:
    for key, value in fragment.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
