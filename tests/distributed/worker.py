"""What each of several processes does: `torchrun -m tests.distributed.worker ENGINE OUT`.

Each scenario writes what it found to `OUT/SCENARIO-RANK.pt`; the tests compare those files.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from dynlora import DynamicLora, DynamicLoraConfig, make_static
from dynlora.integrations.checkpoint import load_state, save_state
from tests.distributed.scenarios import (
    CONFIG,
    RESUMED_AT,
    SCENARIOS,
    STEPS,
    base_norms,
    batches,
    found_by,
    leave,
    lora_weights,
    model_in_float64,
    optimizer_of,
)
from tests.models import loss_of


class Process:
    """One process's part of a model under an engine, and what it saw."""

    def __init__(self, engine: str, importance: str) -> None:
        self.model = model_in_float64()
        self.called: Callable[..., Any] = self.model
        config = DynamicLoraConfig(importance=importance, **CONFIG)
        if engine != "ddp":
            make_static(self.model, config)
        if engine == "fsdp2":
            for block in self.model.get_base_model().model.layers:
                fully_shard(block)
            fully_shard(self.model)
        self.optimizer = optimizer_of(self.model)
        if engine == "accelerate_fsdp2":
            accelerator = accelerator_with_fsdp2()
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        self.dynamic = DynamicLora(self.model, self.optimizer, config)
        if engine == "ddp":
            self.called = DistributedDataParallel(self.model)
        self.seen: list[dict[str, Tensor]] = []
        """Weights after each step."""

    def train(self, first: int, last: int) -> None:
        """Take the steps from `first` to `last`, each on this process's part of the batch."""
        for tokens in batches(first, last, part=distributed.get_rank()):
            loss_of(self.called, tokens).backward()
            self.dynamic.observe()
            self.optimizer.step()
            self.dynamic.step()
            self.optimizer.zero_grad()
            self.seen.append({name: whole(w) for name, w in lora_weights(self.model).items()})

    def found(self) -> dict[str, object]:
        """Return all that the tests look at."""
        return found_by(self.dynamic, weights=self.seen, base_norms=base_norms(self.model))


def accelerator_with_fsdp2() -> Accelerator:
    """Return an Accelerator that shards as that of `accelerate launch`; on CPUs it does not."""
    accelerator = Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
    )
    return accelerator


def whole(value: Any) -> Any:
    """Return a tensor with the parts of all processes, and anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def save(folder: Path, model: nn.Module) -> None:
    """Save the adapter, once, as the engines' own documentation says."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)


def main() -> None:
    """Do every scenario."""
    engine, out = sys.argv[1], Path(sys.argv[2])
    distributed.init_process_group("gloo")
    place = distributed.get_rank()
    for importance in SCENARIOS:
        process = Process(engine, importance)
        process.train(0, RESUMED_AT)
        state = process.dynamic.state_dict()
        weights = {k: v.clone() for k, v in process.model.state_dict().items()}
        moments = copy.deepcopy(process.optimizer.state_dict())
        checkpoint = out / f"{importance}-checkpoint"
        for_one_process = [tree_map(whole, part) for part in (weights, moments)]
        if place == 0:
            checkpoint.mkdir()
            save_state(checkpoint, state)
            for name, part in zip(("model", "optimizer"), for_one_process, strict=True):
                torch.save(part, checkpoint / f"{name}.pt")
        process.train(RESUMED_AT, STEPS)
        torch.save(process.found(), out / f"{importance}-{place}.pt")
        save(out / f"{importance}-adapter", process.model)
        distributed.barrier()

        again = Process(engine, importance)
        again.dynamic.load_state_dict(load_state(checkpoint))
        again.model.load_state_dict(weights)
        again.optimizer.load_state_dict(moments)
        again.train(RESUMED_AT, STEPS)
        torch.save(again.found(), out / f"{importance}-resumed-{place}.pt")
    leave()


if __name__ == "__main__":
    main()
