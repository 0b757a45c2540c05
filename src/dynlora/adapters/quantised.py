"""Base layers quantised by bitsandbytes: keep gradients passing through them."""

from torch import nn

from dynlora.errors import EngineError

_SWITCH = "support_avx512bf16_for_cpu"


def keep_gradients(model: nn.Module) -> None:
    """Prevent 4-bit layers from repacking weights for a kernel without a backward pass.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks permanently in the first forward in eval
    mode. Training after an evaluation would then get no gradient through such a layer, without an
    error. Other layers and devices have no such kernel.

    Args:
        model: Any model; all its 4-bit layers are changed, with or without LoRA.

    Raises:
        EngineError: If an evaluation has repacked a layer, which cannot be undone exactly.
    """
    for name, module in model.named_modules():
        if _SWITCH not in vars(module):
            continue
        if vars(module.weight.quant_state).get("packing_format_for_cpu"):
            raise EngineError(
                f"Gradients must pass through every layer, got {name!r}, whose 4-bit weight "
                "bitsandbytes repacked for inference in an earlier forward in eval mode: load the "
                "model anew, and attach before it is evaluated."
            )
        setattr(module, _SWITCH, False)
