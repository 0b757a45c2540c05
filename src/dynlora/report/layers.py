"""Order a model's layers by their names: stacks of repeated blocks, and short names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

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


def block_of(name: str) -> tuple[str, str, str] | None:
    """Split a module name at its first number into prefix, number and kind; None without a number.

    ``bert.encoder.layer.0.attention.self.query`` is in block ``0`` of ``bert.encoder.layer``.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
    return None


def arrange(names: Sequence[str]) -> list[Stack | tuple[str, ...]]:
    """Group neighbouring module names into stacks and names to list one by one, in the same order.

    The latter are of a pooler, a classifier or a stack without a grid.
    """
    parts: list[Stack | tuple[str, ...]] = []
    for prefix, group in groupby(names, key=lambda name: (block_of(name) or (None,))[0]):
        members = tuple(group)
        stack = Stack(prefix or "")
        for name in members:
            place = block_of(name)
            if place is not None:
                _, block, kind = place
                stack.blocks.setdefault(block, {})[kind] = name
        parts.append(stack if stack.is_regular else members)
    return parts


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return a short, unique name per distinct module name, in the same order.

    ``bert.encoder.layer.0.attention.self.query`` becomes ``0.attention.self.query``. A name without
    a number loses the prefix common to all names; so do all names if two short names would be
    equal.
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    plain = [".".join(part[shared:]) for part in parts]
    blocks = map(block_of, names)
    short = [".".join(b[1:]) if b else p for b, p in zip(blocks, plain, strict=True)]
    chosen = short if len(set(short)) == len(short) else plain
    return dict(zip(names, chosen, strict=True))
