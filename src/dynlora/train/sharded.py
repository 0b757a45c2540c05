"""Jobs whose model FSDP2 or DeepSpeed shards, as configured for `accelerate launch`.

The Trainer shards the model when training begins. Before, each process loads all of it, except that
FSDP's `cpu_ram_efficient_loading` loads it in the first process of a machine.
"""

import os
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from dynlora.engines.fsdp import reshard
from dynlora.engines.sharding import whole
from dynlora.errors import EngineError
from dynlora.train.config import JobConfig
from dynlora.train.methods.starts import takes_from_base, uses_eva
from dynlora.train.processes import sharding_engine


def check_sharding(config: JobConfig) -> None:
    """Raise `EngineError` if a sharded model cannot be trained as configured."""
    engine = sharding_engine()
    if engine is None:
        return
    if engine == "FSDP2" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise EngineError(
            "Accelerate's configuration must be of FSDP2, got FSDP1: set `fsdp_version: 2`."
        )
    refused = {
        "method: adalora": config.method == "adalora",
        # The Trainer loads the best checkpoint into tensors of the last ranks.
        "training.load_best_model_at_end": config.method == "dynamic"
        and config.training.load_best_model_at_end,
        f"lora.init_lora_weights: {config.lora.init_lora_weights}": (
            takes_from_base(config.lora) or uses_eva(config.lora)
        ),
        # The Trainer refuses an optimizer under FSDP, and replaces it under DeepSpeed.
        "training.loraplus_lr_ratio": config.training.loraplus_lr_ratio is not None,
    }
    used = [name for name, on in refused.items() if on]
    if used:
        raise EngineError(
            f"a job under {engine} must not have {' or '.join(used)}: change that, or train with "
            "`dynlora train --processes N`, where each process has the whole model."
        )


def whole_weights(model: Any) -> dict[str, Tensor] | None:
    """Return the trained weights and all buffers on the CPU, gathered by all processes.

    None if the model is not sharded.
    """
    if sharding_engine() is None:
        return None
    reshard(model)
    return {
        name: whole(value).detach().cpu()
        for name, value in model.state_dict(keep_vars=True).items()
        if not isinstance(value, Parameter) or value.requires_grad
    }
