"""Group module names into stacks of repeated blocks and layers outside blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_KINDS = 12
"""Maximum number of layer kinds in a grid; layers of other stacks are listed."""
MIN_FILLED = 0.5
"""Minimum share of grid cells with a layer; layers of sparser stacks are listed."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks with a common name prefix, such as the layers of an encoder."""

    prefix: str
    """Part of the module names before the block number."""
    blocks: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module names by block number and kind, the part of the name after the number."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layer, in order of first appearance."""
        return tuple(dict.fromkeys(kind for block in self.blocks.values() for kind in block))

    @property
    def names(self) -> tuple[str, ...]:
        """All module names."""
        return tuple(name for block in self.blocks.values() for name in block.values())

    @property
    def is_regular(self) -> bool:
        """Whether blocks and kinds form a grid that is small and full enough to draw."""
        cells = len(self.blocks) * len(self.kinds)
        return len(self.kinds) <= MAX_KINDS and len(self.names) >= MIN_FILLED * cells


@dataclass(frozen=True, slots=True)
class Loose:
    """Layers to list one by one, such as a pooler, a classifier or an irregular stack."""

    names: tuple[str, ...]


def block_of(name: str) -> tuple[str, str, str] | None:
    """Split a module name at its first number into prefix, number and kind; None without a number.

    ``bert.encoder.layer.0.attention.self.query`` is in block ``0`` of ``bert.encoder.layer``.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
    return None


def arrange(names: Sequence[str]) -> list[Stack | Loose]:
    """Group module names into stacks and loose layers, in order of first appearance."""
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
