"""Static mode: tensors of one rank for good, so that engines and compiled code see no new shape.

The live components come first and zeros behind. What is saved is cut to the live rank, what is
loaded is padded: from outside the layer looks like one whose tensors have the live rank.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from dynlora.adapters.export import keep_patterns
from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView
from dynlora.adapters.resize import hold_at, set_rank
from dynlora.adapters.sharding import is_there, sharded_as
from dynlora.errors import LayerError


def hold_static(model: nn.Module, layers: Sequence[LoraView], rank: int) -> None:
    """Hold layers in tensors of that rank, unless they are held in such of some rank already.

    To be called before an engine, or an optimizer with a state, has seen the tensors. The hooks on
    saving and loading stay for as long as the tensors are so wide.

    Args:
        model: The PEFT model.
        layers: All LoRA layers of an adapter.
        rank: Highest rank that a layer may come to; wider than a layer's own matrices it never is.
    """
    if any(layer.capacity is None for layer in layers):
        keep_patterns(model, layers)
    for layer in layers:
        if layer.capacity is not None:
            continue
        hold_at(layer, max(layer.r, min(rank, layer.widest)))
        for factor in (layer.factor_A, layer.factor_B):
            holder = factor.holder
            holder.register_load_state_dict_pre_hook(partial(_pad, layer, factor))
            holder.register_state_dict_post_hook(partial(_cut, layer, factor))


def _pad(layer: LoraView, factor: Factor, *given: Any) -> None:
    """Give the layer the rank of the weight that is about to be loaded, and pad that.

    No closures: a copy or a pickle of the model must do so for itself.
    """
    state_dict, prefix = given[1:3]
    key = f"{prefix}{factor.key}"
    if key in state_dict and is_there(state_dict[key]):
        rank = state_dict[key].shape[factor.rank_axis]
        if rank > factor.size:
            raise LayerError(
                f"Weights of {layer.name!r} must be of rank {factor.size} at most, at which its "
                f"tensors are held in static mode, got {rank}: set `max_rank` to {rank} or more."
            )
        matrix = factor.live(state_dict[key], rank)
        set_rank(layer, rank)
        state_dict[key] = sharded_as(factor.parameter, factor.padded(matrix, factor.size))


def _cut(layer: LoraView, factor: Factor, *given: Any) -> None:
    """Leave what is beyond the live rank out of what is saved."""
    state_dict, prefix = given[1:3]
    key = f"{prefix}{factor.key}"
    if key in state_dict and is_there(state_dict[key]):
        state_dict[key] = state_dict[key].narrow(factor.rank_axis, 0, layer.r).contiguous()
