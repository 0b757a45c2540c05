"""What each of several processes does: `torchrun -m tests.distributed.worker OUT`.

Each scenario writes what it found to `OUT/SCENARIO-RANK.pt`; the tests compare those files.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.integrations.checkpoint import load_state, save_state
from tests.distributed.scenarios import (
    CONFIG,
    RESUMED_AT,
    SCENARIOS,
    STEPS,
    batches,
    lora_weights,
    model_in_float64,
    optimizer_of,
)
from tests.models import loss_of


class Process:
    """One process's model under DistributedDataParallel, and what it saw."""

    def __init__(self, importance: str) -> None:
        self.model = model_in_float64()
        self.optimizer = optimizer_of(self.model)
        config = DynamicLoraConfig(importance=importance, **CONFIG)
        self.dynamic = DynamicLora(self.model, self.optimizer, config)
        self.wrapped = DistributedDataParallel(self.model)
        self.seen: list[dict[str, torch.Tensor]] = []
        """Weights after each step."""

    def train(self, first: int, last: int) -> None:
        """Take the steps from `first` to `last`, each on this process's part of the batch."""
        for tokens in batches(first, last, part=distributed.get_rank()):
            loss_of(self.wrapped, tokens).backward()
            self.dynamic.observe()
            self.optimizer.step()
            self.dynamic.step()
            self.optimizer.zero_grad()
            self.seen.append(lora_weights(self.model))

    def found(self) -> dict[str, object]:
        """Return all that the tests look at."""
        return {
            "ranks": self.dynamic.ranks,
            "mode": self.dynamic.mode,
            "history": [event.to_dict() for event in self.dynamic.history],
            "weights": self.seen,
        }


def main() -> None:
    """Do every scenario."""
    out = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    place = distributed.get_rank()
    for importance in SCENARIOS:
        process = Process(importance)
        process.train(0, RESUMED_AT)
        state = process.dynamic.state_dict()
        checkpoint = out / f"{importance}-checkpoint"
        if place == 0:
            checkpoint.mkdir()
            save_state(checkpoint, state)
            torch.save(process.model.state_dict(), checkpoint / "model.pt")
            torch.save(process.optimizer.state_dict(), checkpoint / "optimizer.pt")
        moments = copy.deepcopy(process.optimizer.state_dict())
        weights = {k: v.clone() for k, v in process.model.state_dict().items()}
        process.train(RESUMED_AT, STEPS)
        torch.save(process.found(), out / f"{importance}-{place}.pt")
        if place == 0:
            process.model.save_pretrained(out / f"{importance}-adapter")
        distributed.barrier()

        again = Process(importance)
        again.dynamic.load_state_dict(load_state(checkpoint))
        again.model.load_state_dict(weights)
        again.optimizer.load_state_dict(moments)
        again.train(RESUMED_AT, STEPS)
        torch.save(again.found(), out / f"{importance}-resumed-{place}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
