"""Where attention is: the modules of transformers that compute it, and the layers in their blocks.

A module counts as attention if the code of its forward asks transformers' `AttentionInterface` for
a function. That is what their models have in common, whatever their modules are called.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynlora.adapters.layers import LoraView, find_root
from dynlora.errors import ConfigError

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Name of the interface in every file of transformers that uses it."""
EAGER = "eager_attention_forward"
"""End of the name that the plain implementation has there."""


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """An attention module and the LoRA layers of the block that it is in."""

    module: Any
    config: Any
    """The module's own."""
    interface: Any
    """Functions by name, where the module looks them up."""
    implementation: str
    """Name of the function that the module uses."""
    original: Callable[..., Any]
    """This function."""
    layers: Sequence[LoraView]


def find_blocks(model: nn.Module, layers: Sequence[LoraView]) -> list[AttentionBlock]:
    """Return the attention modules of a model in whose blocks LoRA layers are.

    Raises:
        ConfigError: If there is none, or what it computes cannot be computed again.
    """
    root, _ = find_root(model)
    found = []
    for name, module in root.named_modules():
        code = inspect.unwrap(type(module).forward)
        if not inspect.isfunction(code) or INTERFACE not in code.__code__.co_names:
            continue
        held = [layer for layer in layers if layer.name.startswith(block_of(name))]
        if held and "config" in vars(module):
            found.append(_make_block(module, code, held))
    config = vars(root).get("config")
    if not found or vars(config or root).get("is_encoder_decoder", False):
        raise ConfigError(
            "`importance: attention_entropy` needs blocks of self-attention that use transformers' "
            f"AttentionInterface, with LoRA layers in them, got a {type(root).__name__} "
            f"{'with an encoder and a decoder' if found else 'without such a block'}: use another "
            "metric, such as `signal`."
        )
    return found


def _make_block(module: Any, code: Any, layers: Sequence[LoraView]) -> AttentionBlock:
    names, implementation = code.__globals__, module.config._attn_implementation
    interface = names[INTERFACE]
    eager = [name for name in code.__code__.co_names if name.endswith(EAGER)]
    if implementation == "eager" and eager:
        original = names[eager[0]]
    elif implementation == "sdpa":
        original = interface[implementation]
    else:
        raise ConfigError(
            "`importance: attention_entropy` needs attention that can be computed again, eager or "
            f"sdpa, got {implementation} in a {type(module).__name__}: load the model with "
            "`attn_implementation='sdpa'`, or use another metric."
        )
    return AttentionBlock(module, module.config, interface, implementation, original, layers)


def block_of(name: str) -> str:
    """Return the start of the names of all layers in a module's block.

    Args:
        name: Module name, such as `encoder.layer.3.attention.self`: its block is the numbered
            module that it is in, `encoder.layer.3.`; without numbers, what holds it.
    """
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdecimal()]
    kept = parts[: numbered[-1] + 1] if numbered else parts[:-1]
    return "".join(f"{part}." for part in kept)
