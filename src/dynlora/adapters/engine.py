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
            f"The model must run in one process without an engine that fixes its shapes, got "
            f"{kind.__module__}.{kind.__name__}: pass the bare model and train in one process."
        )
    for module in model.modules():
        if module._compiled_call_impl is not None:
            kind = type(module)
            raise EngineError(
                "The model must run without an engine that fixes its shapes, got "
                f"{kind.__module__}.{kind.__name__} compiled in place: pass the model without "
                "calling `compile()` on it."
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise EngineError(
                f"Training must run in one process, got a process group of {size}: ranks of "
                "several processes cannot move together yet; start one process."
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
