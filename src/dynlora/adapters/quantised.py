"""Base layers that bitsandbytes quantised: what must hold so that gradients pass through them."""

from torch import nn

from dynlora.errors import EngineError

_SWITCH = "support_avx512bf16_for_cpu"


def keep_gradients(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights for a kernel that has no backward pass.

    On CPUs with AVX512-BF16 bitsandbytes 0.50 does so in the first forward in eval mode, for good:
    training after an evaluation would get no gradient from beyond such a layer, without a word.
    Nothing else changes; layers of other kinds and on other devices have no such kernel.

    Args:
        model: Any model; its 4-bit layers are found whether or not they hold LoRA.

    Raises:
        EngineError: If an evaluation has repacked one; the way back is not exact.
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
