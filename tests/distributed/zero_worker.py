"""What each of several processes does under DeepSpeed: `torchrun -m tests.... STAGE OUT`.

Each scenario writes what it found to `OUT/SCENARIO-RANK.pt`; the tests compare those files.
"""

import logging
import os
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before it is imported

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves

from dynlora import DynamicLora
from dynlora.integrations.checkpoint import load_state, save_state
from tests.distributed.scenarios import (
    EXPERTS,
    RESUMED_AT,
    SCENARIOS,
    STEPS,
    base_norms,
    batches,
    config_of,
    found_by,
    leave,
    lora_weights,
    model_in_float64,
    optimizer_of,
)
from tests.models import loss_of


class Process:
    """One process's part of a model under ZeRO, and what it saw."""

    def __init__(self, stage: int, scenario: str) -> None:
        self.model = model_in_float64(scenario)
        self.engine, optimizer = prepared(self.model, stage)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.dynamic = DynamicLora(self.model, optimizer, config_of(scenario))
        self.seen: dict[int, dict[str, Tensor]] = {}
        """Weights by step."""
        self.held: list[int] = []
        """Bytes of the adapter's tensors in each step."""

    def train(self, first: int, last: int) -> None:
        """Take the steps from `first` to `last`, each on this process's part of the batch."""
        for step, tokens in enumerate(batches(first, last, part=distributed.get_rank()), first + 1):
            self.engine.backward(loss_of(self.engine, tokens))
            self.dynamic.observe()
            self.held.append(held_bytes(self.engine))
            self.engine.step()
            self.dynamic.step()
            with deepspeed.zero.GatheredParameters(self.trained):
                self.seen[step] = lora_weights(self.model)

    def found(self) -> dict[str, object]:
        """Return all that the tests look at."""
        now = [p for p in self.model.parameters() if p.requires_grad]
        return found_by(
            self.dynamic,
            weights=self.seen,
            base_norms=base_norms(self.model),
            bytes=fmean(self.held),
            same_parameters=list(map(id, now)) == list(map(id, self.trained)),
        )

    def save_checkpoint(self, folder: Path) -> None:
        """Save the model and its moments by DeepSpeed, and our state beside them."""
        state = self.dynamic.state_dict()
        self.engine.save_checkpoint(folder)
        if distributed.get_rank() == 0:
            save_state(folder, state)
        distributed.barrier()

    def load_checkpoint(self, folder: Path) -> None:
        """Go on where a checkpoint was saved."""
        self.dynamic.load_state_dict(load_state(folder))
        self.engine.load_checkpoint(folder)

    def save_adapter(self, folder: Path) -> None:
        """Save the adapter, once, as DeepSpeed's own documentation says."""
        with deepspeed.zero.GatheredParameters(self.trained):
            if distributed.get_rank() == 0:
                self.model.save_pretrained(folder)


def allow_float64() -> None:
    """Let stage 3 partition a model in float64, which DeepSpeed supports only if asked to."""
    made = parameter_offload.Init
    parameter_offload.Init = lambda **given: made(**given | {"dtype": torch.float32})


def prepared(model: nn.Module, stage: int) -> tuple[Any, Any]:
    """Return DeepSpeed's engine of a model, and its optimizer."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        # Below that many elements stage 3 keeps a parameter whole: some of each.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 600},
        "gradient_clipping": 0.0,
    }
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer_of(model), config=config
    )
    return engine, optimizer


def held_bytes(engine: Any) -> int:
    """Return this process's bytes of trained weights, copies, gradients and moments."""
    zero = engine.optimizer
    fields = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    fields += ("averaged_gradients", "grad_partitions_flat_buffer")
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    held = [[p.data, p.grad, vars(p).get("ds_tensor")] for p in trained]
    found = tree_leaves(
        [held, [vars(zero).get(field) for field in fields], list(zero.state.values())]
    )
    storages = [t.untyped_storage() for t in found if isinstance(t, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def lora_bytes(stage: int, scenario: str) -> int:
    """Return the same of plain LoRA, in the second step."""
    engine, _ = prepared(model_in_float64(scenario), stage)
    for tokens in batches(0, 2, part=distributed.get_rank()):
        engine.backward(loss_of(engine, tokens))
        held = held_bytes(engine)
        engine.step()
    return held


def main() -> None:
    """Do every scenario."""
    stage, out = int(sys.argv[1]), Path(sys.argv[2])
    deepspeed.logger.setLevel(logging.ERROR)
    allow_float64()
    deepspeed.init_distributed("gloo")
    place = distributed.get_rank()
    plain = {scenario: lora_bytes(stage, scenario) for scenario in ("signal", EXPERTS)}
    torch.save(plain, out / f"bytes-{place}.pt")
    for importance in (*SCENARIOS, EXPERTS):
        process = Process(stage, importance)
        process.train(0, RESUMED_AT)
        process.save_checkpoint(out / f"{importance}-checkpoint")
        process.train(RESUMED_AT, STEPS)
        torch.save(process.found(), out / f"{importance}-{place}.pt")
        process.save_adapter(out / f"{importance}-adapter")

        again = Process(stage, importance)
        again.load_checkpoint(out / f"{importance}-checkpoint")
        again.train(RESUMED_AT, STEPS)
        torch.save(again.found(), out / f"{importance}-resumed-{place}.pt")
    leave()


if __name__ == "__main__":
    main()
