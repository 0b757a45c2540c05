"""Live ranks and scales in PEFT's own configuration: what is saved is a stock adapter."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.layers import LoraView, find_root
from dynlora.name_patterns import name_patterns


def own_config(model: nn.Module, adapter: str) -> Any:
    """Return an adapter's `LoraConfig`, which from here on is no other adapter's.

    TRL makes its reference adapter of the trained one's configuration, and a cell that is run again
    gives one to the next model: PEFT keeps the object itself, and patterns would be told of all.

    Args:
        model: The PEFT model.
        adapter: Name of the adapter.
    """
    _, configs = find_root(model)
    configs[adapter] = copy.copy(configs[adapter])
    return configs[adapter]


def write_patterns(peft_config: Any, layers: Sequence[LoraView]) -> None:
    """Make `rank_pattern` and `alpha_pattern` say exactly what the layers hold.

    They replace patterns given before, and match each layer by its whole name. The start becomes
    PEFT's default, because loading draws it again for the new ranks before it loads the weights,
    and `orthogonal` refuses odd ranks.

    Args:
        peft_config: The adapter's `LoraConfig`.
        layers: All of the adapter's LoRA layers.
    """
    ranks = {layer.name: layer.r for layer in layers}
    alphas = {layer.name: layer.alpha for layer in layers}
    peft_config.rank_pattern = name_patterns(ranks, peft_config.r)
    peft_config.alpha_pattern = name_patterns(alphas, peft_config.lora_alpha)
    peft_config.init_lora_weights, peft_config.eva_config = True, None


def keep_patterns(model: nn.Module, layers: Sequence[LoraView]) -> RemovableHandle:
    """Write the patterns anew whenever weights were loaded, for they may be of other ranks.

    Args:
        model: The PEFT model.
        layers: All of the adapter's LoRA layers, whose ranks follow what is loaded.
    """
    root, configs = find_root(model)
    own_config(model, layers[0].adapter)
    # No closure: a copy or a pickle of the model must follow its own loads.
    hook = partial(_write_after_load, configs, layers)
    handle: RemovableHandle = root.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _write_after_load(configs: Mapping[str, Any], layers: Sequence[LoraView], *_: Any) -> None:
    if layers[0].is_there:  # the hook outlives an adapter that is deleted
        write_patterns(configs[layers[0].adapter], layers)
