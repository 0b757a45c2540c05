"""Train a dynamic-rank adapter on E2E NLG: base model in, stock PEFT adapter out.

Takes a few minutes on a CPU. Ranks move and greedy continuations change; quality does not matter.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from dynlora import DynamicLoraCallback, DynamicLoraConfig

RANK = 8
BATCH = 4


def train_adapter(base: Path, data: Path, folder: Path, *, steps: int) -> dict[str, Any]:
    """Train and save an adapter; return how many layers ended at each rank, and the loss.

    Args:
        base: Folder of the base model.
        data: Folder of E2E NLG's parquet files.
        folder: Where the adapter goes.
        steps: Optimizer steps.

    Raises:
        RuntimeError: If no rank moved: the adapter would show nothing.
    """
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = pq.read_table(data / "train.parquet").to_pylist()
    examples = Dataset.from_list(rows).shuffle(seed=0).select(range(steps * BATCH))
    examples = examples.map(lambda row: tokenize(tokenizer, row), remove_columns=["mr", "ref"])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    # Within the `max_lora_rank` of the documented code.
    callback = DynamicLoraCallback(DynamicLoraConfig(max_rank=4 * RANK))
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            warmup_steps=steps // 10,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        ),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.dynamic is not None
    ranks = callback.dynamic.ranks
    if len(set(ranks.values())) == 1:
        raise RuntimeError(f"Ranks must have moved, got {RANK} everywhere after {steps} steps.")
    model.save_pretrained(folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": steps,
        "r": RANK,
        "layers": len(ranks),
        "ranks": dict(sorted(Counter(ranks.values()).items())),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, mr: str) -> list[int]:
    """Return a meaning representation as a chat prompt with a request for an answer."""
    chat = [{"role": "user", "content": mr}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def tokenize(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> dict[str, list[int]]:
    """Return one example with the loss on the answer and its end."""
    prompt = prompt_ids(tokenizer, row["mr"])
    answer = [*tokenizer(row["ref"])["input_ids"], tokenizer.eos_token_id]
    ids = prompt + answer
    labels = [-100] * len(prompt) + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
