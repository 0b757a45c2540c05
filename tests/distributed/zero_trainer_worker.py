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
from torch import distributed
from transformers import Trainer, TrainingArguments

from dynlora import DynamicLoraCallback, DynamicLoraConfig
from tests.distributed.cpus_as_gpus import take_cpus_for_gpus
from tests.distributed.scenarios import RESUMED_AT, STEPS, found_by, leave, lora_weights
from tests.distributed.zero_worker import allow_float64
from tests.integration.test_trainer import CONFIG, Sequences
from tests.integration.test_trainer import STEPS as BATCHES
from tests.models import lora_llama


def main() -> None:
    """Train twice."""
    stage, out = int(sys.argv[1]), Path(sys.argv[2])
    deepspeed.logger.setLevel(logging.ERROR)
    allow_float64()
    for name, last in (("whole", None), ("resumed", out / "run" / f"checkpoint-{RESUMED_AT}")):
        model = lora_llama(r=8).double()
        callback = DynamicLoraCallback(DynamicLoraConfig(**CONFIG), resume_from=last)
        trainer = Trainer(
            model,
            arguments(out / "run", stage),
            train_dataset=Sequences(8 * BATCHES),
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=last and str(last))
        dynamic = callback.dynamic
        assert dynamic is not None
        trained = [p for p in model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(trained):
            found = found_by(dynamic, weights=lora_weights(model))
        torch.save(found, out / f"{name}-{distributed.get_rank()}.pt")
        trainer.save_model(str(out / f"{name}-adapter"))
        distributed.barrier()
    leave()


def arguments(folder: Path, stage: int) -> TrainingArguments:
    """Return those of `tests.integration.test_trainer`, for two processes under DeepSpeed."""
    take_cpus_for_gpus()
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        optim="adamw_torch",
        learning_rate=5e-3,
        weight_decay=0.0,
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
            "zero_optimization": {
                "stage": stage,
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "gradient_clipping": 0.0,
            "train_micro_batch_size_per_gpu": 4,
        },
    )


if __name__ == "__main__":
    main()
