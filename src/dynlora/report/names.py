"""Short names for layers: what tells them apart, without what all of them share."""

from collections.abc import Sequence


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return a short, unique name for each module name, in the same order.

    A name is cut before its first number, which counts the block: of
    ``bert.encoder.layer.0.attention.self.query`` stays ``0.attention.self.query``. What has no
    number loses the prefix that all names share. If two short names were the same, all names
    only lose that prefix.

    Args:
        names: Module names, each different.
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
