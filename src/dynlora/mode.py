"""How tensors are held: at the live rank (`physical`), or at one rank for good (`static`)."""

import logging
from typing import Literal

from torch import nn

from dynlora.adapters.engine import check_engine
from dynlora.adapters.layers import find_lora_layers, find_root
from dynlora.adapters.static import hold_static
from dynlora.adjuster import default_max_rank
from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError

logger = logging.getLogger(__name__)


def choose_mode(
    config: DynamicLoraConfig, *, processes: int, compiled: bool, held_static: bool = False
) -> Literal["physical", "static"]:
    """Return how tensors are to be held, and say so in the log where a choice was made.

    Args:
        config: Its `mode`, and what does not go with it.
        processes: How many train together.
        compiled: Whether the model goes through `torch.compile`.
        held_static: Whether its tensors are static already, by `make_static`.

    Raises:
        ConfigError: If a setting is for one process, or for physical mode, only.
    """
    if config.mode == "physical" and (compiled or held_static):
        raise ConfigError(
            "`mode` must be 'static' or 'auto' for a model that is compiled, or was made static, "
            "got 'physical': compiled code would be made anew at each change of rank."
        )
    if processes > 1 and config.mode == "physical":
        raise ConfigError(
            f"`mode` must be 'static' or 'auto' where {processes} processes train together, "
            "got 'physical': DistributedDataParallel keeps the shapes that it has seen."
        )
    chosen = config.mode == "auto" and (processes > 1 or compiled)
    static = held_static or chosen or config.mode == "static"
    if static and config.input_adaptive:
        raise ConfigError(
            "`input_adaptive` must be false in static mode, got true: its masks follow the live "
            "rank. Train in one process with mode='physical', or turn it off."
        )
    if chosen and not held_static:
        reason = f"{processes} processes train together" if processes > 1 else "torch.compile"
        logger.info("static mode: %s", reason)
    return "static" if static else "physical"


def make_static(
    model: nn.Module, config: DynamicLoraConfig, *, adapter_name: str | None = None
) -> None:
    """Hold a model's LoRA tensors at the highest rank that each layer may come to, for good.

    `DynamicLora` does so by itself in static mode. Only where an engine wraps the model, or the
    optimizer is made, before there is a controller, this must come first. What the model computes,
    and what of it is saved, stays the same.

    Args:
        model: The bare PEFT model.
        config: Its `max_rank` is read.
        adapter_name: The adapter; None for the active one.

    Raises:
        EngineError: If an engine has wrapped the model already.
        LayerError: If there is no LoRA layer, or one that cannot be resized.
    """
    check_engine(model)
    layers = find_lora_layers(model, adapter_name)
    configured = int(find_root(model)[1][layers[0].adapter].r)
    ranks = [layer.r for layer in layers]
    hold_static(model, layers, config.max_rank or default_max_rank(configured, ranks))
