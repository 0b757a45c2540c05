"""The reference for engines: greedy continuations of stock PEFT, and the lead of each choice.

It imports nothing of dynlora, and loads the native adapter as any user of PEFT would.
"""

from pathlib import Path

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.engines.train_adapter import prompt_ids


def choose_prompts(base: Path, data: Path, *, count: int) -> list[list[int]]:
    """Return the tokens of `count` prompts that differ, spread over the validation split.

    Args:
        base: Folder of the base model, for its tokenizer and chat template.
        data: Folder of E2E NLG's parquet files.
        count: Number of prompts.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    texts = pq.read_table(data / "validation.parquet", columns=["mr"]).column("mr").to_pylist()
    distinct = list(dict.fromkeys(texts))
    chosen = distinct[:: len(distinct) // count][:count]
    return [prompt_ids(tokenizer, text) for text in chosen]


def continue_greedily(
    base: Path, adapter: Path | None, prompts: list[list[int]], *, new_tokens: int
) -> list[dict[str, list[float]]]:
    """Return for each prompt what PEFT generates in float32, token by token.

    Args:
        base: Folder of the base model.
        adapter: Folder of a LoRA adapter; None for the base model alone.
        prompts: Token numbers of each prompt.
        new_tokens: Most tokens to generate.

    Returns:
        Per prompt `tokens`, their `logprobs`, the `runner_up` at each place, and `gaps`: by how
        much the chosen token's logit leads the runner-up's.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    return [_continue(model, prompt, new_tokens) for prompt in prompts]


def _continue(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> dict:
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(made.logits)
    best = logits.topk(2)
    logprobs = logits.log_softmax(-1).gather(1, best.indices[:, :1])
    return {
        "tokens": made.sequences[0, len(prompt) :].tolist(),
        "logprobs": logprobs[:, 0].tolist(),
        "runner_up": best.indices[:, 1].tolist(),
        "gaps": (best.values[:, 0] - best.values[:, 1]).tolist(),
    }
