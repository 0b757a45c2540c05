"""Checks of single values, shared by the sections."""

from dynlora.errors import ConfigError


def require(holds: bool, name: str, required: str, given: object) -> None:
    """Check one value.

    Raises:
        ConfigError: If it does not hold; with the key, what it must be and what it is.
    """
    if not holds:
        raise ConfigError(f"`{name}` must be {required}, got {given}.")


def require_one(section: str, **sources: str | None) -> None:
    """Check that exactly one of a section's sources is given.

    Raises:
        ConfigError: If none is, or more than one.
    """
    given = [key for key, value in sources.items() if value is not None]
    if len(given) != 1:
        keys = " or ".join(f"`{section}.{key}`" for key in ("path", *sources))
        found = " and ".join(f"`{section}.{key}`" for key in given) or "none"
        raise ConfigError(f"one source is required, {keys}, got {found}.")
