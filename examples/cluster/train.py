r"""Fine-tune a language model on lines of text, on one machine or many, with ranks that move.

    accelerate launch --config_file examples/cluster/one-node.yaml examples/cluster/train.py \
        --model MODEL --text FILE --output adapter

The same script runs in one process, under DistributedDataParallel, FSDP2 and DeepSpeed: which one
it is says the configuration.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora import DynamicLora, DynamicLoraConfig


def main() -> None:
    """Train, and save one adapter."""
    given = _arguments()
    accelerator = Accelerator()
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(given.model)
    model = get_peft_model(
        base, LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear")
    )
    config = DynamicLoraConfig(total_steps=given.steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.learning_rate)
    lines = [line for line in given.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    loader = DataLoader(
        tokenizer(lines, truncation=True, max_length=given.length)["input_ids"],
        batch_size=given.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: tokenizer.pad({"input_ids": rows}, return_tensors="pt"),
    )
    if len(loader) < accelerator.num_processes:
        raise SystemExit(f"{given.text} must fill a batch of {given.batch_size} in each process")
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    dynamic = DynamicLora(accelerator.unwrap_model(model), optimizer, config)
    model.train()
    step = 0
    while step < given.steps:
        for batch in loader:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            if deepspeed:  # whose engine Accelerate would step inside its backward
                model.backward(loss)
                dynamic.observe()
                model.step()
            else:
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                dynamic.observe()
                optimizer.step()
            dynamic.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == given.steps:
                accelerator.print(f"step {step}: loss {loss.item():.4f}")
            if step == given.steps:
                break
    dynamic.close()
    save = _save_from_deepspeed if deepspeed else _save
    save(accelerator.unwrap_model(model), given.output, accelerator.is_main_process)
    accelerator.print(f"ranks {min(dynamic.ranks.values())} to {max(dynamic.ranks.values())}")
    # DistributedDataParallel must go before its process group: freed later, it may wait forever.
    model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
    accelerator.end_training()


def _save(model: PeftModel, folder: Path, is_first: bool) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # on every process
    if is_first:
        model.save_pretrained(folder, state_dict=weights)


def _save_from_deepspeed(model: PeftModel, folder: Path, is_first: bool) -> None:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([p for p in model.parameters() if p.requires_grad]):
        if is_first:
            model.save_pretrained(folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a language model on lines of text.")
    parser.add_argument("--model", required=True, help="hub name or folder")
    parser.add_argument("--text", type=Path, required=True, help="one example a line")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8, help="in each process")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example, at most")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
