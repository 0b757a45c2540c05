"""PEFT's configuration follows the ranks, and loading a checkpoint sets them."""

import copy
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView, find_root
from dynlora.adapters.patterns import changes_base, name_patterns
from dynlora.adapters.resize import set_rank

_HEADS = {"classifier", "score"}
"""Names of a head; PEFT adds both to `modules_to_save` of a classifier, which has one of them."""


def own_config(configs: dict[str, Any], adapter: str) -> Any:
    """Replace an adapter's `LoraConfig` by a copy of its own, and return the copy.

    PEFT stores the object itself, which other adapters may share, such as TRL's reference adapter.
    """
    configs[adapter] = copy.copy(configs[adapter])
    return configs[adapter]


def write_patterns(peft_config: Any, layers: Sequence[LoraView]) -> None:
    """Set the patterns of all the adapter's layers, by their whole names, in its `LoraConfig`.

    The initialization becomes PEFT's default, because loading draws it for the new ranks before it
    loads the weights, and `orthogonal` refuses odd ranks.
    """
    ranks = {layer.name: layer.r for layer in layers}
    alphas = {layer.name: layer.alpha for layer in layers}
    peft_config.rank_pattern = name_patterns(ranks, peft_config.r)
    peft_config.alpha_pattern = name_patterns(alphas, peft_config.lora_alpha)
    if not changes_base(peft_config.init_lora_weights):  # such an adapter is refused on attach
        peft_config.init_lora_weights, peft_config.eva_config = True, None


def untrained_modules(peft_config: Any, root: nn.Module, trained: Set[int]) -> list[str]:
    """Return the modules that a `LoraConfig` names, and of which no parameter is trained.

    Args:
        peft_config: The `LoraConfig`.
        root: Module that its names are relative to.
        trained: Identities of the parameters that the optimizer updates.
    """
    parameters = root.named_parameters(remove_duplicate=False)
    found = "\n".join(f".{name}." for name, p in parameters if p.requires_grad and id(p) in trained)
    targets, tokens = peft_config.target_modules, peft_config.trainable_token_indices
    named = set(peft_config.modules_to_save or ())
    named |= set() if isinstance(targets, str) else set(targets or ())
    named |= set(tokens) if isinstance(tokens, dict) else {"token_adapter"} if tokens else set()
    missing = {name for name in named if f".{name}." not in found}
    if named >= _HEADS and not missing >= _HEADS:
        missing -= _HEADS
    return sorted(missing)


def keep_patterns(model: nn.Module, layers: Sequence[LoraView]) -> RemovableHandle:
    """Rewrite an adapter's patterns whenever weights are loaded, because ranks may differ."""
    root, configs = find_root(model)
    own_config(configs, layers[0].adapter)
    # Not a closure, because copies and pickles of the model need their own hook.
    hook = partial(_write_after_load, configs, layers)
    handle: RemovableHandle = root.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _write_after_load(configs: Mapping[str, Any], layers: Sequence[LoraView], *_: Any) -> None:
    if layers[0].is_there:  # the hook outlives a deleted adapter
        write_patterns(configs[layers[0].adapter], layers)


class ShapeHooks:
    """Load hooks that give an adapter's layers the ranks of a checkpoint before its tensors.

    `Trainer` loads checkpoints into a model with the configured ranks, whose shapes would differ.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LoraView]) -> None:
        self._handles = [keep_patterns(model, layers)]
        for layer in layers:
            for factor in layer.factors:
                hook = partial(_follow, layer, factor)
                self._handles.append(factor.holder.register_load_state_dict_pre_hook(hook))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _follow(layer: LoraView, factor: Factor, *given: Any) -> None:
    """Set the layer to the rank of the weight before it is loaded."""
    state_dict, prefix = given[1:3]
    weight = state_dict.get(f"{prefix}{factor.key}")
    if weight is not None and weight.numel() > 0:  # DeepSpeed saves empty placeholders
        set_rank(layer, weight.shape[factor.rank_axis] // factor.experts)
