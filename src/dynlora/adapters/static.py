"""Static mode: tensors of a fixed rank, so that engines see no new shapes.

Zeros pad the live components. Saved tensors are cut to the live rank and loaded ones padded, so
that static layers have the same checkpoints as others.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView, find_lora_layers, find_root
from dynlora.adapters.peft_config import keep_patterns
from dynlora.adapters.resize import hold_at, set_rank
from dynlora.config import DynamicLoraConfig
from dynlora.engines.checks import check_engine
from dynlora.engines.sharding import is_there, sharded_as
from dynlora.errors import ConfigError, LayerError


def choose_mode(
    config: DynamicLoraConfig, *, processes: int, compiled: bool, held_static: bool = False
) -> Literal["physical", "static"]:
    """Return the mode of the tensors; "auto" means static if they are, or must be, padded."""
    if config.mode == "physical" and held_static:
        raise ConfigError(
            "`mode` must be 'static' or 'auto' for a model that was made static, got 'physical': "
            "leave out `make_static`."
        )
    static = held_static or config.mode == "static"
    if config.input_adaptive and (static or compiled or processes > 1):
        where = "static mode" if static else f"{processes} processes"
        raise ConfigError(
            f"`input_adaptive` must be false in {'compiled models' if compiled else where}, but "
            "got true: its hooks break compiled graphs, its masks follow the live rank, and its "
            "thresholds one process. Turn it off, or train without these."
        )
    return "static" if static else "physical"


def make_static(
    model: nn.Module, config: DynamicLoraConfig, *, adapter_name: str | None = None
) -> None:
    """Pad a model's LoRA tensors to the highest rank that each layer may reach.

    `DynamicLora` does this automatically in static mode. Call it first if an engine wraps the model
    or the optimizer is built before the controller. Outputs and saved tensors do not change.

    Args:
        model: The PEFT model, not wrapped.
        config: Source of `max_rank`.
        adapter_name: The adapter; None for the active one.

    Raises:
        EngineError: If an engine has already wrapped the model.
        LayerError: If the model has no LoRA layer, or one that cannot be resized.
    """
    check_engine(model)
    layers = find_lora_layers(model, adapter_name)
    configured = int(find_root(model)[1][layers[0].adapter].r)
    ranks = [layer.r for layer in layers]
    hold_static(model, layers, config.highest_rank(configured, ranks))


def hold_static(model: nn.Module, layers: Sequence[LoraView], rank: int) -> None:
    """Pad all layers to a fixed rank, limited by their smaller dimension, unless padded already.

    Call it before an engine, or an optimizer with state, uses the tensors. Its hooks are permanent.
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
