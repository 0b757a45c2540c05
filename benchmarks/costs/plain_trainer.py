"""Fine-tune with LoRA as a user of `Trainer` and PEFT would, without dynlora.

    python -m benchmarks.costs.plain_trainer mrpc --model DIR --data DIR --out DIR
    python -m benchmarks.costs.plain_trainer e2e_nlg --model DIR --data DIR --out DIR

The opponent of `benchmarks.costs.fine_tune`: settings are those of `examples/mrpc.yaml` and
`examples/e2e_nlg.yaml`. Texts are tokenized once, batches are padded to their longest text and
grouped by length, and the optimizer is the Trainer's default. It evaluates and saves as often as
`dynlora train`. Prints the validation loss.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

WARM_UP = 0.06


def main() -> None:
    """Fine-tune on the task, and print the validation loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", required=True, help="folder of train and validation.parquet")
    parser.add_argument("--out", required=True, help="folder of the result")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    options = parser.parse_args()
    set_seed(0)
    files = {name: f"{options.data}/{name}.parquet" for name in ("train", "validation")}
    rows = load_dataset("parquet", data_files=files)
    trainer = TASKS[options.task](options, rows)
    trainer.train()
    trainer.save_model(str(Path(options.out) / "adapter"))
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    print(losses[-1])


def mrpc(options: argparse.Namespace, rows: DatasetDict) -> Trainer:
    """Return the Trainer of a sentence-pair classifier."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )
    tokenized = rows.map(
        lambda batch: tokenizer(
            batch["sentence1"], batch["sentence2"], truncation=True, max_length=128
        ),
        batched=True,
    )

    def accuracy(prediction: Any) -> dict[str, float]:
        return {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())
        }

    return Trainer(
        model=get_peft_model(model, adapter),
        args=_arguments(options, epochs=3, batch=32, rate=1e-3),
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )


def e2e_nlg(options: argparse.Namespace, rows: DatasetDict) -> Trainer:
    """Return the Trainer of a chat model that learns the assistant's turn."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        user = [{"role": "user", "content": row["mr"]}]
        chat = [*user, {"role": "assistant", "content": row["ref"]}]
        prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(chat, return_dict=False)[:160]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels[: len(ids)]}

    tokenized = rows.map(tokenize, remove_columns=rows["train"].column_names)
    return Trainer(
        model=get_peft_model(model, adapter),
        args=_arguments(options, epochs=1, batch=8, rate=5e-4, prediction_loss_only=True),
        train_dataset=tokenized["train"],
        eval_dataset=tokenized["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


TASKS: dict[str, Callable[[argparse.Namespace, DatasetDict], Trainer]] = {
    "mrpc": mrpc, "e2e_nlg": e2e_nlg,
}  # fmt: skip


def _arguments(
    options: argparse.Namespace, *, epochs: int, batch: int, rate: float, **more: Any
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=options.out,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=64,
        learning_rate=rate,
        weight_decay=0.0,
        warmup_steps=WARM_UP,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),  # without it, bf16 is refused
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        eval_on_start=True,
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=10,
        report_to="none",
        **more,
    )


if __name__ == "__main__":
    main()
