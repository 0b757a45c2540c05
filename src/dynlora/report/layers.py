"""Group a model's layers by their names into stacks of repeated blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from dynlora.layer_names import block_of

MAX_KINDS = 12  # maximum number of layer kinds in a grid; layers of other stacks are listed
MIN_FILLED = 0.5  # minimum share of grid cells with a layer; layers of sparser stacks are listed


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks with a common name prefix, such as the layers of an encoder."""

    prefix: str  # part of the module names before the block number
    blocks: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module names by block number and kind, the part of the name after the number."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of layer, in order of first appearance."""
        return tuple(dict.fromkeys(kind for block in self.blocks.values() for kind in block))

    @property
    def is_regular(self) -> bool:
        """Whether blocks and kinds form a grid that is small and full enough to draw."""
        cells = len(self.blocks) * len(self.kinds)
        filled = sum(map(len, self.blocks.values()))
        return 0 < len(self.kinds) <= MAX_KINDS and filled >= MIN_FILLED * cells


def arrange(names: Sequence[str]) -> list[Stack | tuple[str, ...]]:
    """Group neighbouring module names into stacks and names to list one by one, in the same order.

    The latter are of a pooler, a classifier or a stack without a grid.
    """
    parts: list[Stack | tuple[str, ...]] = []
    for prefix, group in groupby(names, key=lambda name: (block_of(name) or (None,))[0]):
        members = tuple(group)
        stack = Stack(prefix or "")
        for name in members:
            if place := block_of(name):
                stack.blocks.setdefault(place[1], {})[place[2]] = name
        parts.append(stack if stack.is_regular else members)
    return parts
