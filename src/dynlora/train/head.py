"""A model's head: the modules for the task beside its pretrained part.

PEFT must be told their names, to train and save them whole and to put no adapter inside. It guesses
some by its `task_type`, but has none for images, and knows neither every name nor layers in a head.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dynlora.base_models import within
from dynlora.errors import ConfigError

USUAL = ("classifier", "score")
"""What transformers' models call their head."""


POOLER = "pooler"
"""What transformers' models call the part that makes one vector of a text for their head."""
NEW = "dynlora_new_modules"
"""Attribute of a model: names of modules of its pretrained part that were newly made."""


def no_head(_model: Any) -> list[str]:
    """Return no names: the task uses the model as it was pretrained."""
    return []


def head_modules(model: Any) -> list[str]:
    """Return the names of the modules that are trained whole for the task.

    They stand beside the pretrained part, or were newly made in it (see `note_new`).

    Args:
        model: One of transformers', with a head.

    Raises:
        ConfigError: If none can be told from the pretrained part.
    """
    names = outer_modules(model)
    if not names:
        raise ConfigError(
            f"the model must have a head of its own, beside {model.base_model_prefix!r} or called "
            f"{' or '.join(USUAL)}, got a {type(model).__name__} made of "
            f"{', '.join(_weighted(model))}: use another model, or `method: full`."
        )
    return [*names, *vars(model).get(NEW, ())]


def outer_modules(model: Any) -> list[str]:
    """Return the names of the modules with weights that stand beside the pretrained part."""
    weighted = _weighted(model)
    if model.base_model_prefix in weighted:
        return [name for name in weighted if name != model.base_model_prefix]
    return [name for name in weighted if name in USUAL]


def _weighted(model: Any) -> list[str]:
    return [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def poolers(model: Any) -> list[str]:
    """Return the names of the poolers with weights in the model's pretrained part, if any."""
    part = dict(model.named_children()).get(model.base_model_prefix)
    if part is None or POOLER not in _weighted(part):
        return []
    return [f"{model.base_model_prefix}.{POOLER}"]


def unread_poolers(model: Any) -> list[str]:
    """Return the names of the poolers of a model without a head: nobody reads what they make."""
    return [name for name in _weighted(model) if name == POOLER]


def note_new(model: Any, modules: Sequence[str]) -> None:
    """Note in a model which modules of its pretrained part were newly made.

    Nothing else tells them from pretrained ones, and frozen they would be lost: an adapter's
    files hold what was trained alone.
    """
    vars(model)[NEW] = tuple(modules)


def linear_layers(model: Any, modules: list[str]) -> list[str]:
    """Return the names of the linear layers that some of the model's modules are or hold."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and within(name, modules)
    ]
