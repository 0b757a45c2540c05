"""`input_adaptive.json` beside an adapter: settings without which it uses every component."""

import math
from pathlib import Path
from typing import Any

from torch import nn

from dynlora.errors import AdapterError
from dynlora.files.json_files import write_json
from dynlora.files.plain_values import parse_json
from dynlora.input_adaptive.complexity import FRACTIONS
from dynlora.input_adaptive.ranks import InputAdaptiveRanks

INPUT_ADAPTIVE = "input_adaptive.json"

_COMPLEXITY = {True: "example", False: "prefix"}


def save_input_adaptive(adaptive: InputAdaptiveRanks, folder: str | Path) -> None:
    """Save the settings of input-adaptive ranks to an adapter's folder.

    Args:
        adaptive: From `DynamicLora.input_adaptive` or `load_input_adaptive`.
        folder: The adapter's folder, as passed to `save_pretrained`.
    """
    values = {
        "complexity": _COMPLEXITY[adaptive.whole],
        "thresholds": list(adaptive.thresholds),
        "fractions": list(FRACTIONS),
    }
    write_json(Path(folder) / INPUT_ADAPTIVE, values)


def load_input_adaptive(
    model: nn.Module, folder: str | Path, *, adapter_name: str | None = None
) -> InputAdaptiveRanks:
    """Enable the input-adaptive ranks that an adapter was trained with.

    Examples:
        >>> model = PeftModel.from_pretrained(base, "adapter")
        >>> adaptive = load_input_adaptive(model, "adapter")

    Args:
        model: The PEFT model, with the adapter loaded.
        folder: The adapter's folder.
        adapter_name: The adapter; None for the active one.

    Returns:
        The active ranks: `disabled()` suspends them, `close()` removes them.

    Raises:
        AdapterError: If the file is missing, invalid, or of another kind of model.
        EngineError: If the model runs under an engine that bypasses hooks.
        LayerError: If the model or one of its LoRA layers does not support input-adaptive ranks.
    """
    path = Path(folder) / INPUT_ADAPTIVE
    complexity, thresholds = _read(path)
    adaptive = InputAdaptiveRanks(model, adapter_name=adapter_name, thresholds=thresholds)
    if complexity != _COMPLEXITY[adaptive.whole]:
        adaptive.close()
        raise AdapterError(
            f"{path} must be of a model of this kind, whose complexity is that of the "
            f"{_COMPLEXITY[adaptive.whole]}, got {complexity!r}: load the adapter on the "
            "model that it was trained on."
        )
    return adaptive


def _read(path: Path) -> tuple[Any, tuple[float, ...]]:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        thresholds = [float(value) for value in values["thresholds"]]
        fractions, complexity = values["fractions"], values["complexity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"An adapter trained with `input_adaptive=True` must have a {path.name}, but {path} "
            f"cannot be read ({type(error).__name__}: {error}): restore it, or use the adapter "
            "without input-adaptive ranks."
        ) from error
    ascending = thresholds == sorted(thresholds) and all(map(math.isfinite, thresholds))
    if len(thresholds) not in (0, len(FRACTIONS) - 1) or not ascending:
        raise AdapterError(
            f"`thresholds` in {path} must be {len(FRACTIONS) - 1} ascending numbers, or none, got "
            f"{thresholds}: restore the file."
        )
    if fractions != list(FRACTIONS):
        raise AdapterError(
            f"`fractions` in {path} must be {list(FRACTIONS)}, as this version of dynlora uses "
            f"them, got {fractions}: load it with the version that it was trained with."
        )
    return complexity, tuple(thresholds)
