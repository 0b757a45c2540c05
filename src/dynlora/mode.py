"""Tensor shapes: `physical` (the live rank) or `static` (a fixed rank)."""

import logging
from typing import Literal

from torch import nn

from dynlora.adapters.layers import find_lora_layers, find_root
from dynlora.adapters.static import hold_static
from dynlora.adjuster import default_max_rank
from dynlora.config import DynamicLoraConfig
from dynlora.engines.checks import check_engine
from dynlora.errors import ConfigError

logger = logging.getLogger(__name__)


def choose_mode(
    config: DynamicLoraConfig, *, processes: int, compiled: bool, held_static: bool = False
) -> Literal["physical", "static"]:
    """Return the mode of the tensors, and log the reason if "auto" selects static mode.

    Args:
        config: Source of `mode` and `input_adaptive`.
        processes: Number of training processes.
        compiled: Whether `torch.compile` compiles the model.
        held_static: Whether `make_static` has already made the tensors static.

    Raises:
        ConfigError: If a setting requires one process or physical mode.
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
    hold_static(model, layers, config.max_rank or default_max_rank(configured, ranks))
