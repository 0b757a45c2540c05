"""Engines that fix or shard the tensors' shapes are refused by name."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dynlora.errors import EngineError


def check_engine(model: nn.Module) -> None:
    """Check that ranks can change under the engine that runs this model.

    Raises:
        EngineError: If they cannot.
    """
    kind = type(model)
    fixed = (DataParallel, DistributedDataParallel, torch._dynamo.OptimizedModule)
    if isinstance(model, fixed) or kind.__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        raise EngineError(
            f"The model must be the bare one, got {kind.__module__}.{kind.__name__}: attach to the "
            "model inside, before an engine wraps it, and wrap it then. Several processes under "
            "DistributedDataParallel train together so; FSDP, DeepSpeed and torch.compile are not "
            "supported yet."
        )
    for module in model.modules():
        if module._compiled_call_impl is not None:
            kind = type(module)
            raise EngineError(
                "The model must run without an engine that fixes its shapes, got "
                f"{kind.__module__}.{kind.__name__} compiled in place: pass the model without "
                "calling `compile()` on it."
            )


def check_devices(parameters: Sequence[Parameter]) -> None:
    """Check that all LoRA parameters are on one device.

    Raises:
        EngineError: If a device map has spread them over several.
    """
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise EngineError(
            f"All LoRA layers must be on one device, got {', '.join(devices)}: load the model "
            "without a `device_map` that splits it."
        )
