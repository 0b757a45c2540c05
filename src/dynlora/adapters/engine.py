"""Engines that fix or shard the tensors' shapes are refused by name."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dynlora.errors import EngineError


def check_engine(model: nn.Module) -> None:
    """Check that ranks can change under the engine that runs this model.

    Raises:
        EngineError: If they cannot.
    """
    kind = type(model)
    fixed = (DataParallel, DistributedDataParallel, torch._dynamo.OptimizedModule)
    if isinstance(model, fixed) or kind.__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        raise EngineError(
            f"The model must run in one process without an engine that fixes its shapes, got "
            f"{kind.__module__}.{kind.__name__}: pass the bare model and train in one process."
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = torch.distributed.get_world_size()
        if size > 1:
            raise EngineError(
                f"Training must run in one process, got a process group of {size}: ranks of "
                "several processes cannot move together yet; start one process."
            )
