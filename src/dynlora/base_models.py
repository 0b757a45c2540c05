"""Weights of a base model: a folder or hub name in; out the model, and what had to be made up.

Code that lies beside a model never runs, and nothing is left at random values unnoticed:
transformers draws anew what a file lacks or holds in another shape, and tells its log alone.
"""

import struct
from collections.abc import Collection
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

UNLOADABLE = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    TypeError,
    RuntimeError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises for files that are missing, broken, of an unknown architecture, or need
a package that is not installed."""
LENGTH_KEYS = ("max_position_embeddings", "n_positions")
"""Where models' configurations say how many positions there are."""
NO_CODE = {"trust_remote_code": False}
"""Arguments of every `from_pretrained`: without them transformers asks whether to run the code."""


class UnfitWeightsError(ValueError):
    """A model's files lack weights that its configuration asks for.

    One of `UNLOADABLE`: whoever loads a model says which one it was.
    """


def load_weights(form: Any, place: str, **options: Any) -> tuple[Any, frozenset[str]]:
    """Return a model and the names of its weights that are newly drawn.

    Weights that are tied to others, and buffers that are computed, are not among them.

    Args:
        form: One of transformers' classes.
        place: Folder or hub name.
        options: Further arguments of `from_pretrained`.

    Raises:
        UNLOADABLE: If the model cannot be loaded.
    """
    model, info = form.from_pretrained(
        place, ignore_mismatched_sizes=True, output_loading_info=True, **options | NO_CODE
    )
    unlike = {name for name, *_ in info["mismatched_keys"]}
    return model, frozenset(info["missing_keys"] | unlike)


def refuse_drawn(model: Any, drawn: Collection[str]) -> None:
    """Refuse a model of which these weights are newly drawn.

    Raises:
        UnfitWeightsError: If there are any.
    """
    if not drawn:
        return
    names = list(model.state_dict())
    first = next((name for name in names if name in drawn), min(drawn))
    if 2 * len(drawn) > len(names):
        advice = "the files hold another model than config.json says: download both again."
    else:
        advice = "use the config.json and the files that were saved together."
    raise UnfitWeightsError(
        f"{len(drawn)} of its {len(names)} weights are missing in its files or have another shape "
        f"there, the first is {first!r}, and would be left at random values: {advice}"
    )


def position_limit(model: Any) -> int | None:
    """Return how many tokens a model has positions for; None where any number goes.

    RoBERTa and its kin count them from behind the padding token's place.
    """
    config = model.config.to_dict()
    limits = [config[key] for key in LENGTH_KEYS if isinstance(config.get(key), int)]
    for name, module in model.named_modules():
        skipped = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and skipped is not None:
            limits.append(module.num_embeddings - skipped - 1)
    return min(limits, default=None)


def within(name: str, modules: Collection[str]) -> bool:
    """Return whether a module or weight of that name is one of the modules or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
