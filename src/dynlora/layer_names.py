"""Module names: the block that a layer is in, and names short enough to read."""

from collections.abc import Sequence


def block_of(name: str) -> tuple[str, str, str] | None:
    """Split a module name at its first number into prefix, number and kind; None without a number.

    ``bert.encoder.layer.0.attention.self.query`` is in block ``0`` of ``bert.encoder.layer``.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[:place]), part, ".".join(parts[place + 1 :])
    return None


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
