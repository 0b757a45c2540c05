"""Layer types whose LoRA ranks can change, one per file."""

from collections.abc import Mapping
from typing import Any

from dynlora.adapters.kinds.conv2d import CONV2D
from dynlora.adapters.kinds.embedding import EMBEDDING
from dynlora.adapters.kinds.factor import Factor
from dynlora.adapters.kinds.kind import LayerKind, Rows
from dynlora.adapters.kinds.linear import LINEAR
from dynlora.errors import LayerError

_KINDS: Mapping[str, LayerKind] = {
    "peft.tuners.lora.layer.Linear": LINEAR,
    "peft.tuners.lora.bnb.Linear4bit": LINEAR,
    "peft.tuners.lora.bnb.Linear8bitLt": LINEAR,
    "peft.tuners.lora.layer.Embedding": EMBEDDING,
    "peft.tuners.lora.layer.Conv2d": CONV2D,
}
"""By name of PEFT's class, because bitsandbytes classes cannot always be imported."""


def kind_of(name: str, module: Any) -> LayerKind:
    """Return the kind of a `peft.tuners.lora.LoraLayer`.

    Raises:
        LayerError: If ranks cannot change on layers of its class.
    """
    kind = type(module)
    full_name = f"{kind.__module__}.{kind.__qualname__}"
    if full_name not in _KINDS:
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Linear (also quantised by bitsandbytes), Conv1D "
            f"of transformers, nn.Embedding or nn.Conv2d, got {full_name} on "
            f"{type(module.get_base_layer()).__name__}: name the layers to adapt, such as "
            '`target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]`, instead of "all-linear", '
            "and set no `target_parameters`."
        )
    return _KINDS[full_name]


__all__ = ["Factor", "LayerKind", "Rows", "kind_of"]
