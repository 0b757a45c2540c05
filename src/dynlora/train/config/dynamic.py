"""Section `dynamic`: `DynamicLoraConfig` as keys of a job, with limits and a preset.

The core's dataclass does not know pydantic, so its fields are read here once.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, cast, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    TypeAdapter,
    WrapValidator,
    create_model,
)

from dynlora.config import PRESET_TEXT, DynamicLoraConfig, PresetName, preset_values
from dynlora.errors import ConfigError
from dynlora.train.config.values import (
    SECTION,
    AboveZero,
    AtLeastZero,
    Count,
    Fraction,
    Switch,
    UpToOne,
    Whole,
)

TYPES: dict[str, Any] = {
    "temperature": AboveZero,
    "uniform_mix": UpToOne,
    "feature_weight": UpToOne,
    "min_rank": Count,
    "max_rank": Count | None,
    "total_steps": Count | None,
    "first_event": Fraction,
    "last_event": Fraction,
    "events": Count,
    "hysteresis": AtLeastZero,
    "shrink_tolerance": UpToOne,
}
"""Types with limits, by field; the limits are the core's own."""


def _make_section() -> type[BaseModel]:
    """Return a model with the fields of `DynamicLoraConfig`, and `preset`."""
    hints = get_type_hints(DynamicLoraConfig)
    # pydantic accepts a configuration for a foreign dataclass only inside another type.
    described = TypeAdapter(list[DynamicLoraConfig], config=SECTION).json_schema()
    texts = described["$defs"][DynamicLoraConfig.__name__]["properties"]
    keys: dict[str, Any] = {
        "preset": (PresetName, Field(default="default", description=PRESET_TEXT))
    }
    for field in fields(DynamicLoraConfig):
        hint = hints[field.name]
        kind = TYPES.get(field.name, {int: Whole, bool: Switch}.get(hint, hint))
        text = texts[field.name]["description"]
        keys[field.name] = (kind, Field(default=field.default, description=text))
    config = SECTION | ConfigDict(title=DynamicLoraConfig.__name__)
    model = create_model("DynamicSection", __config__=config, **keys)
    return cast(type[BaseModel], model)


def _read(given: Any, validate: Callable[[Any], BaseModel]) -> DynamicLoraConfig:
    """Return the configuration; values that are not given are those of the preset."""
    if isinstance(given, DynamicLoraConfig):
        return given
    values = validate(given).model_dump(exclude_unset=True)
    preset = preset_values(values.pop("preset", "default"))
    try:
        return DynamicLoraConfig(**{**preset, **values})
    except ConfigError as error:
        raise ConfigError(str(error).replace("`", "`dynamic.", 1)) from error


DynamicSection = Annotated[
    DynamicLoraConfig,
    GetPydanticSchema(lambda _, handler: handler(Annotated[_make_section(), WrapValidator(_read)])),
]
"""`DynamicLoraConfig` as the type of a key."""
