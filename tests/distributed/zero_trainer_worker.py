"""`transformers.Trainer` under DeepSpeed in each of several processes: `torchrun -m ... STAGE OUT`.

Trains to the end, then once more from the checkpoint in the middle; writes what the tests compare.
"""

import logging
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported

import deepspeed
import torch
from accelerate.state import PartialState
from torch import distributed, nn
from torch.optim import AdamW
from transformers import Trainer, TrainingArguments

from dynlora import DynamicLoraCallback, DynamicLoraConfig
from tests.distributed.scenarios import RESUMED_AT, STEPS, found_by, leave, lora_weights
from tests.integration.test_trainer import CONFIG, Sequences
from tests.integration.test_trainer import STEPS as BATCHES
from tests.models import lora_llama


class AdamWByParameter:
    """Makes an optimizer with a group for each parameter."""

    def __call__(self, model: nn.Module, **settings: float) -> AdamW:
        """Return it for what of the model can be trained."""
        groups = [{"params": [p]} for p in model.parameters() if p.requires_grad]
        return AdamW(groups, **settings)


def main() -> None:
    """Train twice."""
    stage, out = int(sys.argv[1]), Path(sys.argv[2])
    deepspeed.logger.setLevel(logging.ERROR)
    for name, checkpoint in (("whole", None), ("resumed", f"checkpoint-{RESUMED_AT}")):
        model = lora_llama(r=8).double()
        callback = DynamicLoraCallback(DynamicLoraConfig(**CONFIG))
        trainer = Trainer(
            model,
            arguments(out / "run", stage),
            train_dataset=Sequences(8 * BATCHES),
            callbacks=[callback],
            optimizer_cls_and_kwargs=(AdamWByParameter, {"lr": 5e-3, "weight_decay": 0.0}),
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(out / "run" / checkpoint))
        dynamic = callback.dynamic
        assert dynamic is not None
        found = found_by(dynamic, weights=lora_weights(model))
        torch.save(found, out / f"{name}-{distributed.get_rank()}.pt")
        trainer.save_model(str(out / f"{name}-adapter"))
        distributed.barrier()
    leave()


def arguments(folder: Path, stage: int) -> TrainingArguments:
    """Return those of `tests.integration.test_trainer`, for two processes under DeepSpeed."""
    given = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=RESUMED_AT,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
        dataloader_pin_memory=False,
        deepspeed={
            "zero_optimization": {"stage": stage},
            "gradient_clipping": 0.0,
            "train_micro_batch_size_per_gpu": 4,
        },
    )
    # On CPUs Accelerate takes each process for the only one, whatever DeepSpeed has started.
    PartialState._shared_state["num_processes"] = distributed.get_world_size()
    for index in ("process_index", "local_process_index"):
        PartialState._shared_state[index] = distributed.get_rank()
    return given


if __name__ == "__main__":
    main()
