"""Seconds and peak memory of `extract` on large models: Llama-3-8B's shape with four blocks.

    python -m benchmarks.costs.extract_large

The base model is random, in bfloat16, and every linear layer, the embedding and the head of the
tuned one differ. The reference reads the same files and calls `torch.svd_lowrank` on each change,
as many directions and passes, and nothing else. Memory is the highest resident set above that of
the imported process, without file pages. Each measurement has a process of its own. Needs 8 GB of
disk. Writes `benchmarks/results/extract_large.json`.
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

from benchmarks.costs.resize_large import HIDDEN, KEYS, LARGEST, MIDDLE, SHAPES, WORDS
from dynlora.adapter_files.extract import MORE, PASSES, extract

BLOCKS, RANK, REPEATS = 4, 64, 3
SHARDS = BLOCKS + 1
PAUSE = 0.01
"""Seconds between two looks at the memory."""


def write_models(base: Path, tuned: Path) -> None:
    """Write both models, one shard per block, and one for embedding and head."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=BLOCKS, vocab_size=WORDS,
        num_attention_heads=HIDDEN // 128, num_key_value_heads=KEYS // 128,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for folder in (base, tuned):
        folder.mkdir()
        config.save_pretrained(folder)
    for shard in range(SHARDS):
        if shard < BLOCKS:
            start = f"model.layers.{shard}"
            shapes = {f"{start}.{name}.weight": shape for name, shape in SHAPES.items()}
            norms = [f"{start}.{k}_layernorm.weight" for k in ("input", "post_attention")]
        else:
            shapes = dict.fromkeys(("lm_head.weight", "model.embed_tokens.weight"), (WORDS, HIDDEN))
            norms = ["model.norm.weight"]
        plain = {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in norms}
        weights = {
            k: 0.02 * torch.randn(shape, dtype=torch.bfloat16) for k, shape in shapes.items()
        }
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        places |= dict.fromkeys([*plain, *weights], name)
        save_file(plain | weights, base / name)
        changed = {k: w + 0.002 * torch.randn_like(w) for k, w in weights.items()}
        save_file(plain | changed, tuned / name)
    for folder in (base, tuned):
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def reference(base: Path, tuned: Path) -> None:
    """Read both models and reduce each change."""
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as before, safe_open(tuned / shard.name, "pt") as after:
            keys = before.keys()
            for key in keys:
                change = after.get_tensor(key).float() - before.get_tensor(key).float()
                if change.ndim == 2:
                    torch.svd_lowrank(change, q=RANK + MORE, niter=PASSES)


def ours(base: Path, tuned: Path) -> None:
    """Extract the adapter."""
    extract(base, tuned, RANK)


def measure(work: Callable[[Path, Path], None], base: Path, tuned: Path) -> dict[str, float]:
    """Return seconds, processor seconds and peak bytes of a call."""
    peak, done, before = [0], threading.Event(), _anonymous()

    def watch() -> None:
        while not done.wait(PAUSE):
            peak[0] = max(peak[0], _anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, used = time.perf_counter(), time.process_time()
    work(base, tuned)
    seconds, processor = time.perf_counter() - start, time.process_time() - used
    done.set()
    watcher.join()
    return {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak[0]}


def _anonymous() -> int:
    """Return the resident bytes that are no file pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    """Measure both in turn, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/extract_large.json"))
    options = parser.parse_args()
    result: dict[str, Any] = {"ours": [], "reference": []}
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = Path(folder) / "base", Path(folder) / "tuned"
        write_models(base, tuned)
        for _ in range(REPEATS):
            for name, work in (("ours", ours), ("reference", reference)):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    result[name].append(pool.apply(measure, (work, base, tuned)))
                print(name, result[name][-1], flush=True)
    pairs = zip(result["ours"], result["reference"], strict=True)
    result["ratios"] = [one["seconds"] / other["seconds"] for one, other in pairs]
    peak = max(run["peak_bytes"] for run in result["ours"])
    result |= {"peak_by_largest": peak / LARGEST["model"], "threads": torch.get_num_threads()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
