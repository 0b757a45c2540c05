"""Keep fully trained modules in float32 inside a half-precision model.

A bfloat16 weight changes by at least 0.4 % or not at all, so most optimizer updates would be lost.
PEFT keeps adapter weights in float32, but not `modules_to_save`.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


def hold_in_float32(model: Any) -> bool:
    """Convert fully trained modules to float32.

    Args:
        model: PEFT model, changed in place. Modules inside the pretrained part still output the
            model's dtype; the head beside it outputs float32.

    Returns:
        Whether any module had another dtype.
    """
    beside = list(model.get_base_model().children())
    changed = False
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                changed |= _hold(module, inside=wrapper not in beside)
    return changed


def reload_in_float32(model: Any, folder: Path) -> None:
    """Convert fully trained modules to float32, and reload their saved float32 weights.

    Args:
        model: PEFT model with the saved adapter, changed in place.
        folder: The saved adapter.
    """
    if hold_in_float32(model):
        trained = model.active_adapter
        model.load_adapter(
            folder, trained, is_trainable=not model.peft_config[trained].inference_mode
        )


def _hold(module: nn.Module, *, inside: bool) -> bool:
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
    if not kinds:
        return False
    module.float()
    module.register_forward_pre_hook(_take_float32, with_kwargs=True)
    if inside:
        (before,) = kinds
        module.register_forward_hook(lambda _module, _args, output: _cast(output, before))
    return True


def _take_float32(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Return nested values with all floating-point tensors cast to one dtype."""
    return recursively_apply(lambda tensor: tensor.to(dtype), values, test_type=_is_floating)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
