"""Engines around a model: detect them, and refuse those in which ranks cannot change."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dynlora.errors import EngineError


def check_engine(model: nn.Module) -> None:
    """Check that ranks can change under the engine that runs this model.

    Raises:
        EngineError: If an engine has wrapped the model.
    """
    kind = type(model)
    wrappers = isinstance(model, DataParallel | DistributedDataParallel)
    if wrappers or kind.__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        raise EngineError(
            f"The model must be the bare one, got {kind.__module__}.{kind.__name__}: ranks must be "
            "attached before an engine wraps it. Make `DynamicLora(model, ...)` first and "
            "`DistributedDataParallel(model)` of the bare model then. With FSDP2 and DeepSpeed "
            "`make_static(model, config)` comes first, the engine next, and `DynamicLora(model, "
            "...)` of the bare model last. FSDP1 is not supported."
        )


def is_compiled(model: nn.Module) -> bool:
    """Return whether `torch.compile` compiles a model or a part of it."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def without_compiler(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`'s wrapper, or the model itself."""
    if not isinstance(model, torch._dynamo.OptimizedModule):
        return model
    inner: nn.Module = model._orig_mod
    return inner


def check_not_compiled(model: nn.Module) -> None:
    """Check that a model is not compiled.

    Raises:
        EngineError: If it is compiled.
    """
    if is_compiled(model):
        raise EngineError(
            f"The model must run without torch.compile, got a compiled {type(model).__name__}: "
            "pass the bare model, and do not compile it."
        )


def check_devices(parameters: Sequence[Parameter]) -> None:
    """Check that all LoRA parameters are on one device with float64.

    Raises:
        EngineError: If they are on several devices, or on Apple's GPU.
    """
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise EngineError(
            f"All LoRA layers must be on one device, got {', '.join(devices)}: load the model "
            "without a `device_map` that splits it."
        )
    if devices[0].startswith("mps"):
        raise EngineError(
            f"All LoRA layers must be on a device with float64, got {devices[0]}, which has none: "
            "train on the CPU, in `TrainingArguments` with `use_cpu=True`."
        )
