"""Forward of LoRA on a parameter, such as the fused weights of experts, that compiles once.

PEFT parametrizes the module in each forward and thus gives it another class, for which compiled
code compiles again. Here the module runs with the sum of both weights in place of its own.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.func import functional_call

from dynlora.engines.sharding import is_sharded


def computes(module: ParamWrapper, options: dict[str, Any]) -> bool:
    """Return whether `forward` computes this call; PEFT's forward computes all others."""
    adapters, weight = module.active_adapters, module.get_param()
    return (
        len(adapters) == 1
        and adapters[0] in module.lora_A
        and module.num_experts > 1
        and not (module.merged or module.disable_adapters or "adapter_names" in options)
        and weight.dtype.itemsize > 1  # PEFT adds to 8-bit weights in float32
        and not is_sharded(weight)  # ZeRO-3 gathers parameters that the module has
    )


def forward(module: ParamWrapper, *args: Any, **options: Any) -> Any:
    """Return PEFT's output to the last bit."""
    lhs, rhs, scaling = module.get_delta_factors(module.active_adapters[0])
    weight = module.get_param()
    with torch.autocast(weight.device.type, enabled=False):
        weight = torch.baddbmm(weight, lhs, rhs, alpha=scaling)
    inner, name = module.base_layer, module.parameter_name
    while isinstance(inner, ParamWrapper):  # PEFT nests one per parameter of a module
        inner, name = inner.base_layer, f"base_layer.{name}"
    return functional_call(module.base_layer, {name: weight}, args, options)
