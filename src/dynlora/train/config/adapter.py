"""Sections `lora` and `adalora`, in PEFT's words, and `dynamic`: `DynamicLoraConfig` as keys."""

from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal, cast, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    TypeAdapter,
    WithJsonSchema,
    WrapValidator,
    create_model,
)
from pydantic.dataclasses import dataclass

from dynlora.config import PRESET_TEXT, DynamicLoraConfig, PresetName, preset_values
from dynlora.errors import ConfigError
from dynlora.train.config.sections import (
    SECTION,
    AboveZero,
    AtLeastZero,
    BelowOne,
    Count,
    Fraction,
    Switch,
    UpToOne,
    Whole,
    require,
)

CEILING = 64
"""Value of `lora.r: auto`."""
Rank = Annotated[
    Count,
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto", "type": "string"}]}
    ),
]
"""A rank, or `auto` in a file, which `read_job` replaces."""

StartName = Literal[
    "gaussian", "orthogonal", "eva", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"
]


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class LoraSettings:
    """The LoRA adapter, in PEFT's words. `r` sets the budget of every LoRA method."""

    r: Rank = 8
    """Rank of each layer; with `method: dynamic` the mean rank, or `auto`: start at 64, and end at
    the ranks that are needed (`dynamic.budget_end: auto`). [r]"""
    lora_alpha: AboveZero = 16.0
    """Scale of the adapter times `r`. [lora_alpha]"""
    lora_dropout: BelowOne = 0.0
    """Dropout on the adapter's input. [lora_dropout]"""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Last parts of the names of modules to adapt, such as `[query, value]`; `all-linear` adapts
    every linear layer except the classifier. [target_modules]"""
    modules_to_save: tuple[str, ...] = ()
    """Last parts of the names of modules to train in full and save with the adapter, such as
    `[embed_tokens]`. A new head of the task is always included. [modules_to_save]"""
    use_rslora: Switch = False
    """Divide `lora_alpha` by the square root of `r` instead of by `r`. [use_rslora]"""
    use_dora: Switch = False
    """DoRA: also learn the norm of each column of the weight, with `method: lora` or `dynamic`.
    Adds one parameter per output of a layer, outside the budget of `dynamic`. [use_dora]"""
    init_lora_weights: StartName | Switch = True
    """Initialization of a new adapter. true is PEFT's default; `eva` uses directions of the
    training data's inputs; `pissa` and `olora` use a part of the base weights, which is restored
    when the adapter is saved, at twice the rank. [init_lora_weights]"""
    start_from: str | None = None
    """Folder of a trained LoRA adapter of this base model to continue from, with its ranks,
    scales, targets and modules to save. The other keys of this section have no effect, except `r`
    with `method: dynamic`: a larger `r` than the adapter's raises the budget."""

    def __post_init__(self) -> None:
        """Check how values fit together."""
        start = self.init_lora_weights
        if start is False:
            raise ConfigError(
                "`lora.init_lora_weights` must not change the model's outputs, but got false, "
                "which starts with random changes. Use true, or the name of an initialization."
            )
        even = start != "orthogonal" or self.r % 2 == 0
        require(even, "lora.r", "even with `lora.init_lora_weights: orthogonal`", self.r)


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class AdaLoraSettings:
    """PEFT's AdaLoRA, for comparison (`method: adalora`). `lora.r` is its target rank.

    `lora_alpha` is multiplied by ``init_r / r``, because AdaLoRA divides it by `init_r` where LoRA
    divides it by `r`. Otherwise the effective scale, and the effective learning rate, would differ.
    """

    init_r: Whole | None = None
    """Rank at the start, above `lora.r`; null means 1.5 times `lora.r`. [init_r]"""
    initial_fraction: BelowOne = 0.1
    """Fraction of the steps before ranks fall. [tinit]"""
    final_fraction: BelowOne = 0.3
    """Fraction of the steps after ranks have fallen, below 1 - `initial_fraction`. [tfinal]"""
    interval: Count = 10
    """Steps between two allocations. [deltaT]"""
    orth_reg_weight: AtLeastZero = 0.1
    """Weight of the orthogonality penalty in training; evaluation never includes it.
    [orth_reg_weight]"""


TYPES: dict[str, Any] = {
    "temperature": AboveZero,
    "uniform_mix": UpToOne,
    "feature_weight": UpToOne,
    "min_rank": Count,
    "max_rank": Count | None,
    "budget_end": Fraction | Literal["auto"] | None,
    "budget_tolerance": UpToOne,
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
