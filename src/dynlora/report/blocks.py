"""A model's plan from its module names: what repeats block by block, and what stands alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_KINDS = 12
"""Most kinds of layer that are drawn side by side; blocks with more are listed."""
MIN_FILLED = 0.5
"""Least part of a grid that must hold a layer; blocks that differ more are listed."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks that follow one another and hold the same kinds of layer."""

    prefix: str
    """What stands before the block's number in the names."""
    blocks: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module names by the block's number and by kind: what stands behind the number."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layer, in the order in which they first appear."""
        return tuple(dict.fromkeys(kind for block in self.blocks.values() for kind in block))

    @property
    def names(self) -> tuple[str, ...]:
        """All module names."""
        return tuple(name for block in self.blocks.values() for name in block.values())

    @property
    def is_regular(self) -> bool:
        """Whether blocks and kinds make a grid that can be read."""
        cells = len(self.blocks) * len(self.kinds)
        return len(self.kinds) <= MAX_KINDS and len(self.names) >= MIN_FILLED * cells


@dataclass(frozen=True, slots=True)
class Loose:
    """Layers that are in no block, such as a pooler or a classifier."""

    names: tuple[str, ...]


def block_of(name: str) -> tuple[str, str, str] | None:
    """Return a module name cut at its first number: prefix, number, kind; None without one.

    ``bert.encoder.layer.0.attention.self.query`` is in block ``0`` of ``bert.encoder.layer``.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
    return None


def arrange(names: Sequence[str]) -> list[Stack | Loose]:
    """Return the parts of a model from input to output, as far as the order of names tells it."""
    stacks: dict[str, Stack] = {}
    loose: dict[int, list[str]] = {}
    order: list[str | int] = []
    for name in names:
        place = block_of(name)
        if place is None:
            key: str | int = len(stacks)
            loose.setdefault(len(stacks), []).append(name)
        else:
            key, block, kind = place
            stack = stacks.setdefault(key, Stack(key))
            stack.blocks.setdefault(block, {})[kind] = name
        if key not in order:
            order.append(key)
    return [_part(key, stacks, loose) for key in order]


def _part(
    key: str | int, stacks: Mapping[str, Stack], loose: Mapping[int, Sequence[str]]
) -> Stack | Loose:
    if isinstance(key, int):
        return Loose(tuple(loose[key]))
    stack = stacks[key]
    return stack if stack.is_regular else Loose(stack.names)
