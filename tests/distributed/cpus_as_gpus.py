"""Let Accelerate shard models on CPUs, where by itself it wraps them in DistributedDataParallel."""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def take_cpus_for_gpus() -> None:
    """Make Accelerate start FSDP2 and DeepSpeed over gloo, with tensors on the CPU."""
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
