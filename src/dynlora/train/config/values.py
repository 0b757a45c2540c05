"""Types of values with their limits, and one check, shared by the sections."""

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from dynlora.errors import ConfigError

SECTION = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Configuration of every section: no unknown keys; the string under a key describes it."""


def _read_number(given: Any) -> Any:
    """Convert a number in exponent notation: YAML 1.1 reads `1e-4`, without a dot, as a text."""
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given


_READ = BeforeValidator(_read_number)
AboveZero = Annotated[float, Field(strict=True, gt=0), _READ]
AtLeastZero = Annotated[float, Field(strict=True, ge=0), _READ]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1), _READ]
"""In [0, 1)."""
UpToOne = Annotated[float, Field(strict=True, ge=0, le=1), _READ]
"""In [0, 1]."""
Fraction = Annotated[float, Field(strict=True, gt=0, le=1), _READ]
"""In (0, 1]."""
InnerFraction = Annotated[float, Field(strict=True, gt=0, lt=1), _READ]
"""In (0, 1)."""
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Switch = Annotated[bool, Field(strict=True)]


def require(holds: bool, key: str, required: str, given: object) -> None:
    """Raise a `ConfigError` about a value that depends on another one, unless `holds`."""
    if not holds:
        raise ConfigError(f"`{key}` must be {required}, but got {given}.")
