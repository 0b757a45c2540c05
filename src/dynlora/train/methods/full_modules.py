"""Modules trained in full beside an adapter: find a model's head, and keep such modules in float32.

PEFT's guess of the head by `task_type` has no type for images and misses some names. PEFT leaves
such modules in bfloat16, in which a weight changes by at least 0.4 % or not at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import VisionTextDualEncoderModel

from dynlora.adapter_files.base_models import within
from dynlora.errors import ConfigError

USUAL = ("classifier", "score")  # names of the head in transformers' models
POOLER = "pooler"
"""Name of the module in transformers' models that pools a text into one vector for the head."""
PROJECTORS = ("multi_modal_projector", "connector")
"""Names of such modules in LLaVA and Idefics, and in related models."""
NEW = "dynlora_new_modules"
"""Model attribute with the names of randomly initialized modules in the pretrained part."""


def head_modules(model: Any) -> list[str]:
    """Return the modules to train in full: outside the pretrained part, or noted by `note_new`."""
    names = outer_modules(model)
    if not names:
        raise ConfigError(
            f"the model must have a head of its own, beside {model.base_model_prefix!r} or called "
            f"{' or '.join(USUAL)}, got a {type(model).__name__} made of "
            f"{', '.join(_weighted(model))}: use another model, or `method: full`."
        )
    return [*names, *new_modules(model)]


def outer_modules(model: Any) -> list[str]:
    """Return the names of the modules with weights beside the pretrained part."""
    weighted = _weighted(model)
    if model.base_model_prefix in weighted:
        return [name for name in weighted if name != model.base_model_prefix]
    return [name for name in weighted if name in USUAL]


def poolers(model: Any) -> list[str]:
    """Return the names of the poolers with weights in the model's pretrained part, if any."""
    part = dict(model.named_children()).get(model.base_model_prefix)
    if part is None or POOLER not in _weighted(part):
        return []
    return [f"{model.base_model_prefix}.{POOLER}"]


def unread_poolers(model: Any) -> list[str]:
    """Return the names of the poolers of a model without head, whose outputs are unused."""
    return [name for name in _weighted(model) if name == POOLER]


def unread_outputs(model: Any) -> list[str]:
    """Return the names of the output layers whose weights `nn.MultiheadAttention` reads itself."""
    attentions = (n for n, each in model.named_modules() if isinstance(each, nn.MultiheadAttention))
    return [f"{name}.out_proj" for name in attentions]


def new_projections(model: Any) -> list[str]:
    """Return the projections of two towers, random when transformers composes both; else none."""
    if not isinstance(model, VisionTextDualEncoderModel):
        return []
    return ["visual_projection", "text_projection"]


def projectors(model: Any) -> list[str]:
    """Return the names of the modules that project features of images into a language model."""
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in PROJECTORS]


def new_modules(model: Any) -> list[str]:
    """Return the modules noted by `note_new`."""
    return [*vars(model).get(NEW, ())]


def note_new(model: Any, modules: Sequence[str]) -> None:
    """Record randomly initialized modules of the pretrained part, which must be trained."""
    vars(model)[NEW] = tuple(modules)


def linear_layers(model: Any, modules: list[str]) -> list[str]:
    """Return the names of the linear layers in, or equal to, the given modules."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and within(name, modules)
    ]


def _weighted(model: Any) -> list[str]:
    return [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def hold_in_float32(model: Any) -> bool:
    """Convert fully trained modules of a PEFT model to float32; return whether any was not.

    Modules inside the pretrained part still output the model's dtype.
    """
    beside = list(model.get_base_model().children())
    changed = False
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                changed |= _hold(module, inside=wrapper not in beside)
    return changed


def reload_in_float32(model: Any, folder: Path) -> None:
    """Convert fully trained modules to float32, and reload their float32 weights from `folder`."""
    if hold_in_float32(model):
        name = model.active_adapter
        model.load_adapter(folder, name, is_trainable=not model.peft_config[name].inference_mode)


def _hold(module: nn.Module, *, inside: bool) -> bool:
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if not kinds:
        return False
    module.float()
    module.register_forward_pre_hook(
        lambda _module, *given: _cast(given, torch.float32), with_kwargs=True
    )
    if inside:
        (before,) = kinds
        module.register_forward_hook(lambda _module, _args, output: _cast(output, before))
    return True


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Return nested values with all floating-point tensors cast to one dtype."""
    return recursively_apply(
        lambda tensor: tensor.to(dtype),
        values,
        test_type=lambda value: isinstance(value, Tensor) and value.is_floating_point(),
    )
