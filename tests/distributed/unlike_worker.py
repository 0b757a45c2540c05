"""Processes that would plan differently (torchrun -m tests.distributed.unlike_worker OUT).

Each has a floor under its shares of its own, and the second would grow other directions: rounding
could make them differ, too.
"""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.adapters import lora_adapters
from tests.distributed.scenarios import (
    CONFIG,
    STEPS,
    batches,
    found_by,
    leave,
    lora_weights,
    model_in_float64,
    optimizer_of,
)
from tests.models import train


def main() -> None:
    """Train."""
    distributed.init_process_group("gloo")
    place = distributed.get_rank()
    model = model_in_float64()
    optimizer = optimizer_of(model)
    config = DynamicLoraConfig(
        importance="gradient_norm", shrink_tolerance=1, uniform_mix=float(place), **CONFIG
    )
    if place:
        made = lora_adapters.new_rows
        lora_adapters.new_rows = lambda *a, **k: [rows + 1e-3 for rows in made(*a, **k)]
    dynamic = DynamicLora(model, optimizer, config)
    called = DistributedDataParallel(model)
    train(called, optimizer, dynamic, STEPS, batches=batches(0, STEPS, part=place))
    found = found_by(dynamic, weights=lora_weights(model))
    torch.save(found, Path(sys.argv[1]) / f"found-{place}.pt")
    leave()


if __name__ == "__main__":
    main()
