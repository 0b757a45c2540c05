"""Load hooks that give LoRA layers the ranks of a checkpoint during its load.

`Trainer` resumes, and reloads its best checkpoint, by loading tensors into a model with the
configured ranks. After changes of rank the shapes differ, so that the hooks set ranks first.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from dynlora.adapters.export import keep_patterns
from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView
from dynlora.adapters.resize import set_rank


class ShapeHooks:
    """A load-state-dict pre-hook on each `lora_A` and `lora_B` of an adapter."""

    def __init__(self, model: nn.Module, layers: Sequence[LoraView]) -> None:
        """Install the hooks, including one that updates PEFT's configuration.

        Args:
            model: The PEFT model.
            layers: All LoRA layers of an adapter.
        """
        self._handles = [keep_patterns(model, layers)]
        for layer in layers:
            for factor in (layer.factor_A, layer.factor_B):
                hook = partial(_follow, layer, factor)
                self._handles.append(factor.holder.register_load_state_dict_pre_hook(hook))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _follow(layer: LoraView, factor: Factor, *given: Any) -> None:
    """Set the layer to the rank of the weight before it is loaded.

    Not a closure, because copies and pickles of the model need their own hook.
    """
    state_dict, prefix = given[1:3]
    weight = state_dict.get(f"{prefix}{factor.key}")
    if weight is not None and layer.capacity is None:  # static layers have a hook of their own
        set_rank(layer, weight.shape[factor.rank_axis])
