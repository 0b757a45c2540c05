"""Find a model's head: the task's modules beside the pretrained part.

PEFT needs their names to train and save them in full and to put no adapter inside. Its guess by
`task_type` has no type for images, and misses some names and the layers inside a head.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dynlora.adapter_files.base_models import within
from dynlora.errors import ConfigError

USUAL = ("classifier", "score")
"""Names of the head in transformers' models."""


POOLER = "pooler"
"""Name of the module in transformers' models that pools a text into one vector for the head."""
NEW = "dynlora_new_modules"
"""Model attribute with the names of randomly initialized modules in the pretrained part."""


def no_head(_model: Any) -> list[str]:
    """Return no names, for a task without head."""
    return []


def head_modules(model: Any) -> list[str]:
    """Return the names of the modules to train in full for the task.

    These are the modules beside the pretrained part, and those recorded by `note_new`.

    Args:
        model: A transformers model with a head.

    Raises:
        ConfigError: If the model has no recognizable head.
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
    """Return the names of the modules with weights beside the pretrained part."""
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
    """Return the names of the poolers of a model without head, whose outputs are unused."""
    return [name for name in _weighted(model) if name == POOLER]


def note_new(model: Any, modules: Sequence[str]) -> None:
    """Record the randomly initialized modules of a model's pretrained part.

    They must be trained, because an adapter's files contain only trained weights.
    """
    vars(model)[NEW] = tuple(modules)


def linear_layers(model: Any, modules: list[str]) -> list[str]:
    """Return the names of the linear layers in, or equal to, the given modules."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and within(name, modules)
    ]
