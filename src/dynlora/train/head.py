"""A model's head: the modules for the task beside its pretrained part.

PEFT must be told their names, to train and save them whole and to put no adapter inside. It guesses
some by its `task_type`, but has none for images, and knows neither every name nor layers in a head.
"""

from typing import Any

import torch

from dynlora.errors import ConfigError

USUAL = ("classifier", "score")
"""What transformers' models call their head."""


def no_head(_model: Any) -> list[str]:
    """Return no names: the task uses the model as it was pretrained."""
    return []


def head_modules(model: Any) -> list[str]:
    """Return the names of the modules with weights that stand beside the pretrained part.

    Args:
        model: One of transformers', with a head.

    Raises:
        ConfigError: If none can be told from the pretrained part.
    """
    weighted = [
        name for name, child in model.named_children() if any(True for _ in child.parameters())
    ]
    if model.base_model_prefix in weighted:
        names = [name for name in weighted if name != model.base_model_prefix]
    else:
        names = [name for name in weighted if name in USUAL]
    if not names:
        raise ConfigError(
            f"the model must have a head of its own, beside {model.base_model_prefix!r} or called "
            f"{' or '.join(USUAL)}, got a {type(model).__name__} made of {', '.join(weighted)}: "
            "use another model, or `method: full`."
        )
    return names


def linear_layers(model: Any, modules: list[str]) -> list[str]:
    """Return the names of the linear layers that some of the model's modules are or hold."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and any(name == outer or name.startswith(f"{outer}.") for outer in modules)
    ]
