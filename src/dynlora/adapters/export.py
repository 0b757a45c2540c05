"""Live ranks and scalings in PEFT's configuration, so that saved adapters are stock adapters."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.layers import LoraView, find_root
from dynlora.name_patterns import name_patterns
from dynlora.starts import changes_base


def own_config(model: nn.Module, adapter: str) -> Any:
    """Replace an adapter's `LoraConfig` by a copy of its own, and return the copy.

    PEFT stores the object itself. Other adapters may share it: TRL's reference adapter, or a model
    in a notebook cell that runs twice. Patterns would then reach all of them.

    Args:
        model: The PEFT model.
        adapter: Name of the adapter.
    """
    _, configs = find_root(model)
    configs[adapter] = copy.copy(configs[adapter])
    return configs[adapter]


def write_patterns(peft_config: Any, layers: Sequence[LoraView]) -> None:
    """Set `rank_pattern` and `alpha_pattern` to the layers' ranks and alphas.

    They replace earlier patterns, and match each layer by its whole name. The initialization
    becomes PEFT's default, because loading draws it for the new ranks before it loads the weights,
    and `orthogonal` refuses odd ranks.

    Args:
        peft_config: The adapter's `LoraConfig`.
        layers: All of the adapter's LoRA layers.
    """
    ranks = {layer.name: layer.r for layer in layers}
    alphas = {layer.name: layer.alpha for layer in layers}
    peft_config.rank_pattern = name_patterns(ranks, peft_config.r)
    peft_config.alpha_pattern = name_patterns(alphas, peft_config.lora_alpha)
    if not changes_base(peft_config.init_lora_weights):  # such an adapter is refused on attach
        peft_config.init_lora_weights, peft_config.eva_config = True, None


def keep_patterns(model: nn.Module, layers: Sequence[LoraView]) -> RemovableHandle:
    """Rewrite the patterns whenever weights are loaded, because ranks may differ.

    Args:
        model: The PEFT model.
        layers: All of the adapter's LoRA layers, whose ranks follow loaded weights.
    """
    root, configs = find_root(model)
    own_config(model, layers[0].adapter)
    # Not a closure, because copies and pickles of the model need their own hook.
    hook = partial(_write_after_load, configs, layers)
    handle: RemovableHandle = root.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _write_after_load(configs: Mapping[str, Any], layers: Sequence[LoraView], *_: Any) -> None:
    if layers[0].is_there:  # the hook outlives a deleted adapter
        write_patterns(configs[layers[0].adapter], layers)
