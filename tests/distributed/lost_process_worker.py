"""`transformers.Trainer` in each of several processes (torchrun -m tests.distributed....).

Trains from the last checkpoint that there is, or from the start; writes what the tests compare.
With a step as second argument the second process kills itself after it, as a machine that is lost.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.distributed.scenarios import STEPS, found_by, leave, lora_weights
from tests.integration.test_trainer import trainer_of
from tests.models import lora_llama


class Killed(TrainerCallback):
    """Kills one process after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **others):  # type: ignore[no-untyped-def]
        """Kill it."""
        if state.global_step == self._step and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Train."""
    out = Path(sys.argv[1])
    model = lora_llama(r=8).double()
    trainer, callback = trainer_of(
        model,
        out,
        steps=STEPS,
        per_device_train_batch_size=4,
        ddp_backend="gloo",
        save_strategy="steps",
        save_steps=4,
    )
    if len(sys.argv) > 2:
        trainer.add_callback(Killed(int(sys.argv[2])))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.exists() else None)
    dynamic = callback.dynamic
    assert dynamic is not None
    found = found_by(dynamic, weights=lora_weights(model))
    torch.save(found, out / f"found-{distributed.get_rank()}.pt")
    leave()


if __name__ == "__main__":
    main()
