"""`transformers.Trainer` in each of several processes (torchrun -m tests.distributed....).

Trains to the end, then once more from the checkpoint in the middle; writes what the tests compare.
"""

import sys
from pathlib import Path

import torch
from torch import distributed

from tests.distributed.scenarios import RESUMED_AT, STEPS, found_by, leave, lora_weights
from tests.integration.test_trainer import trainer_of
from tests.models import lora_llama


def main() -> None:
    """Train twice."""
    out = Path(sys.argv[1])
    for name, checkpoint in (("whole", None), ("resumed", f"checkpoint-{RESUMED_AT}")):
        model = lora_llama(r=8).double()
        trainer, callback = trainer_of(
            model,
            out / "run",
            steps=STEPS,
            per_device_train_batch_size=4,
            ddp_backend="gloo",
            save_strategy="steps",
            save_steps=RESUMED_AT,
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(out / "run" / checkpoint))
        dynamic = callback.dynamic
        assert dynamic is not None
        found = found_by(dynamic, weights=lora_weights(model))
        torch.save(found, out / f"{name}-{distributed.get_rank()}.pt")
        trainer.save_model(str(out / f"{name}-adapter"))
        distributed.barrier()
    leave()


if __name__ == "__main__":
    main()
