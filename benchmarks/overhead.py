"""What the dynamic part costs on MRPC: steps with it and without, interleaved in one run.

Two models with the same weights take the same batches in turn, a step each: one as plain PEFT LoRA,
one with the controller attached in its default configuration. The order within a pair alternates.
Ranks move, at the same number of parameters: what is compared is two whole training runs.

    python benchmarks/overhead.py --model DIR --data DIR --out benchmarks/results
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.train.config import DataConfig, TrainingConfig
from dynlora.train.data import load_task
from dynlora.train.pretrained import load_tokenizer
from dynlora.train.trainer import make_sampler, use_bf16

BATCH = 32


def main() -> None:
    """Time the pairs and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder of MRPC's parquet files")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    batches = _batches(options)
    runs = {name: _Run(options.model) for name in ("plain", "dynamic")}
    dynamic = runs["dynamic"]
    config = DynamicLoraConfig(total_steps=len(batches))
    dynamic.controller = DynamicLora(dynamic.model, dynamic.optimizer, config)
    for step, batch in enumerate(batches):
        for name in ("plain", "dynamic") if step % 2 else ("dynamic", "plain"):
            runs[name].step(batch)
    plain, full = runs["plain"].seconds[5:], dynamic.seconds[5:]
    result = {
        "steps": len(plain),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bf16": use_bf16("auto"),
        "events": len(dynamic.controller.history),
        "plain_seconds": sum(plain),
        "dynamic_seconds": sum(full),
        "overhead_of_the_run": sum(full) / sum(plain) - 1,
        "median_step_plain": median(plain),
        "median_step_dynamic": median(full),
        "booked_by_the_controller": dynamic.controller.seconds / sum(full),
        "seconds_per_event": dynamic.event_seconds / len(dynamic.controller.history),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


class _Run:
    """One model with its optimizer, and the seconds of its steps."""

    def __init__(self, path: str) -> None:
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
        targets = ["query", "key", "value", "dense"]
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
        self.model: nn.Module = get_peft_model(base, lora).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, lr=1e-3, weight_decay=0)
        self.trained = trained
        self.controller: DynamicLora | None = None
        self.seconds: list[float] = []
        self.event_seconds = 0.0

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """Take one optimizer step, timed."""
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_bf16("auto")):
            loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        if self.controller is not None:
            self.controller.observe()
        self.optimizer.step()
        if self.controller is not None:
            events, before = len(self.controller.history), time.perf_counter()
            self.controller.step()
            if len(self.controller.history) > events:
                self.event_seconds += time.perf_counter() - before
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)


def _batches(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    tokenizer = load_tokenizer(options.model, 128)
    data = DataConfig(path=options.data, text="sentence1", text_pair="sentence2", max_length=128)
    rows = load_task(data, tokenizer).train
    sampler = make_sampler(rows, TrainingConfig(batch_size=BATCH))
    collate = DataCollatorWithPadding(tokenizer)
    batches = []
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), BATCH):
            batches.append(collate([rows[i] for i in order[start : start + BATCH]]))
    return batches


if __name__ == "__main__":
    main()
