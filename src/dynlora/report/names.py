"""Short names of layers, without their common prefix."""

from collections.abc import Sequence


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return a short, unique name per module name, in the same order.

    The part before the first number, which counts the block, is cut:
    ``bert.encoder.layer.0.attention.self.query`` becomes ``0.attention.self.query``. A name without
    a number loses the prefix common to all names. If two short names are equal, all names lose only
    that prefix.

    Args:
        names: Distinct module names.
    """
    parts = [name.split(".") for name in names]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    plain = [".".join(p[shared:]) for p in parts]
    short = [".".join(p[_first_number(p, shared) :]) for p in parts]
    chosen = short if len(set(short)) == len(short) else plain
    return dict(zip(names, chosen, strict=True))


def _first_number(parts: Sequence[str], otherwise: int) -> int:
    return next((place for place, part in enumerate(parts[:-1]) if part.isdigit()), otherwise)
