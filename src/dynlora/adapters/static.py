"""Static mode: tensors of a fixed rank, so that engines and compiled code see no new shapes.

Zeros pad the live components. Saved tensors are cut to the live rank and loaded ones padded, so
that static layers have the same checkpoints as others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from dynlora.adapters.kinds import Factor
from dynlora.adapters.layers import LoraView
from dynlora.adapters.peft_config import keep_patterns
from dynlora.adapters.resize import hold_at, set_rank
from dynlora.engines.sharding import is_there, sharded_as
from dynlora.errors import LayerError


def hold_static(model: nn.Module, layers: Sequence[LoraView], rank: int) -> None:
    """Pad layers to a fixed rank, unless padded already.

    Call it before an engine, or an optimizer with state, uses the tensors. The hooks on saving and
    loading are permanent.

    Args:
        model: The PEFT model.
        layers: All LoRA layers of an adapter.
        rank: Highest possible rank; a layer's smaller dimension limits it further.
    """
    if any(layer.capacity is None for layer in layers):
        keep_patterns(model, layers)
    for layer in layers:
        if layer.capacity is not None:
            continue
        hold_at(layer, max(layer.r, min(rank, layer.widest)))
        for factor in layer.factors:
            holder = factor.holder
            holder.register_load_state_dict_pre_hook(partial(_pad, layer, factor))
            holder.register_state_dict_post_hook(partial(_cut, layer, factor))


def _pad(layer: LoraView, factor: Factor, *given: Any) -> None:
    """Set the layer to the rank of the loaded weight, and pad the weight."""
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
    """Cut saved weights to the live rank."""
    state_dict, prefix = given[1:3]
    key = f"{prefix}{factor.key}"
    if key in state_dict and is_there(state_dict[key]):
        state_dict[key] = state_dict[key].narrow(factor.rank_axis, 0, layer.r).contiguous()
