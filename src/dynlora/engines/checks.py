"""Refuse engines, devices and quantised layers under which ranks cannot change."""

from collections.abc import Sequence

from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dynlora.errors import EngineError

_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of 4-bit layers that switches the repacking on."""


def check_engine(model: nn.Module) -> None:
    """Raise `EngineError` if an engine has wrapped the model."""
    kind = type(model)
    wrappers = isinstance(model, DataParallel | DistributedDataParallel)
    if wrappers or kind.__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        raise EngineError(
            f"The model must be the bare one, got {kind.__module__}.{kind.__name__}. With "
            "DeepSpeed, give the model inside the engine. FSDP1 and DataParallel are not "
            "supported: use FSDP2's `fully_shard` or DistributedDataParallel."
        )


def check_devices(parameters: Sequence[Parameter]) -> None:
    """Raise `EngineError` unless all LoRA parameters are on devices with float64."""
    if any(parameter.device.type == "mps" for parameter in parameters):
        raise EngineError(
            "All LoRA layers must be on a device with float64, got mps, which has none: train on "
            "the CPU, in `TrainingArguments` with `use_cpu=True`."
        )


def keep_gradients(model: nn.Module) -> None:
    """Prevent 4-bit layers from repacking their weights for a kernel of inference.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks in the first forward in eval mode, which
    cannot be undone exactly. Training after an evaluation would then get no gradient through such a
    layer, with or without LoRA, and no error.
    """
    for name, module in model.named_modules():
        if _REPACKS not in vars(module):
            continue
        if vars(module.weight.quant_state).get("packing_format_for_cpu"):
            raise EngineError(
                f"Gradients must pass through every layer, got {name!r}, whose 4-bit weight "
                "bitsandbytes repacked for inference in an earlier forward in eval mode: load the "
                "model anew, and attach before it is evaluated."
            )
        setattr(module, _REPACKS, False)
