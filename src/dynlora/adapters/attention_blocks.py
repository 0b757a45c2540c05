"""Attention modules of transformers' models, and the LoRA layers in their blocks.

A module counts as attention if its forward uses transformers' `AttentionInterface`, because all
their models share this interface but not the names of modules.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynlora.adapters.layers import LoraView, find_root
from dynlora.errors import ConfigError

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Name of the interface in transformers' modeling files."""
EAGER = "eager_attention_forward"
"""Suffix of the name of the eager implementation in these files."""


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """An attention module and the LoRA layers in its block."""

    module: Any
    config: Any
    """The module's configuration."""
    interface: Any
    """Table of functions by name that the module uses."""
    implementation: str
    """Name of the module's attention function."""
    original: Callable[..., Any]
    """The module's attention function."""
    layers: Sequence[LoraView]


def find_blocks(model: nn.Module, layers: Sequence[LoraView]) -> list[AttentionBlock]:
    """Return the model's attention modules with LoRA layers in their blocks.

    Raises:
        ConfigError: If there is none, attention cannot be recomputed, or the model is an
            encoder-decoder.
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
    """Return the name prefix of a module's block.

    Args:
        name: Module name, such as `encoder.layer.3.attention.self`. Its block is the innermost
            numbered module, `encoder.layer.3.`, or its parent without numbers.
    """
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdecimal()]
    kept = parts[: numbered[-1] + 1] if numbered else parts[:-1]
    return "".join(f"{part}." for part in kept)
