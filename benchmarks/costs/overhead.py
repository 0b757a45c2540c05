"""What dynamic ranks cost in a whole run on MRPC: steps of five models, interleaved in one process.

The models start with the same weights and take every batch in turn, in rotating order: plain PEFT
LoRA; the same with fused layers; with a controller that observes and plans but keeps all ranks
(`importance: uniform`); with the defaults, so that ranks move; and one that gets those ranks at the
same steps, untimed, without observing. The last one shows the cost of different ranks alone.

    ONEDNN_PRIMITIVE_CACHE_CAPACITY=20000 python -m benchmarks.costs.overhead --model DIR --data DIR

`dynlora train` sets this variable too. Without it, torch keeps 1,024 kernels on a CPU and generates
kernels for new ranks again and again in bfloat16.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from dynlora import DynamicLora, DynamicLoraConfig, FusedLora, RankPlan
from dynlora.adapter_files.base_models import Source
from dynlora.train.config import DataConfig, TrainingConfig
from dynlora.train.task import load_data
from dynlora.train.tasks import TASKS
from dynlora.train.trainer import make_sampler, row_lengths, use_bf16

BATCH = 32
WARM_UP = 5
"""First steps, which are not counted."""


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
    runs = {name: _Run(options.model) for name in ("plain", "fused", "observed", "moved", "given")}
    FusedLora(runs["fused"].model)
    controllers = {
        name: DynamicLora(
            runs[name].model,
            runs[name].optimizer,
            DynamicLoraConfig(importance=importance, total_steps=len(batches)),
        )
        for name, importance in (("observed", "uniform"), ("moved", "signal"), ("given", "uniform"))
    }
    moved, given = controllers["moved"], controllers["given"]
    runs["observed"].controller, runs["moved"].controller = controllers["observed"], moved
    given.freeze()
    names = list(runs)
    for index, batch in enumerate(batches):
        for place in range(len(names)):
            runs[names[(index + place) % len(names)]].step(batch)
        if len(moved.history) > len(given.history):
            given.apply(RankPlan(step=index + 1, ranks=moved.ranks))
    seconds = {name: run.seconds[WARM_UP:] for name, run in runs.items()}
    result = {
        "steps": len(batches) - WARM_UP,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bf16": use_bf16("auto"),
        "onednn_primitive_cache_capacity": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY"),
        "seconds": {name: sum(values) for name, values in seconds.items()},
        "median_step": {name: median(values) for name, values in seconds.items()},
        "over_plain": {name: _over(v, seconds["plain"]) for name, v in seconds.items()},
        "over_fused": {name: _over(v, seconds["fused"]) for name, v in seconds.items()},
        "moved_over_given": _over(seconds["moved"], seconds["given"]),
        "booked_by_the_controller": {
            name: run.controller.seconds / sum(seconds[name])
            for name, run in runs.items()
            if run.controller is not None
        },
        "events": len(moved.history),
        "seconds_per_event": runs["moved"].event_seconds / len(moved.history),
        "distinct_ranks": len(set(moved.ranks.values())),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _over(seconds: list[float], other: list[float]) -> dict[str, float]:
    """Return the relative difference of the sums, and the median over pairs of steps."""
    pairs = [a / b - 1 for a, b in zip(seconds, other, strict=True)]
    return {"sum": sum(seconds) / sum(other) - 1, "median_of_pairs": median(pairs)}


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
    task = TASKS["sequence_classification"]
    data = DataConfig(path=options.data, text="sentence1", text_pair="sentence2", max_length=128)
    tokenizer = task.load_processor(Source(place=options.model), data)
    rows = load_data(task, data, tokenizer).train
    sampler = make_sampler(row_lengths(rows), TrainingConfig(batch_size=BATCH))
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
