"""Seconds and peak memory of `resize` on a large adapter: Llama-3.1-8B, all linear layers, r = 64.

    python -m benchmarks.resize_large

The weights are random, in float32. A quarter of the parameters remain: by energy (two passes over
the layers), and as one rank. Memory is the highest resident set above that of the process with all
imports, in a process of its own. Writes `benchmarks/results/resize_large.json`.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dynlora.adapter_files.adapter import SavedAdapter, read_adapter, write_adapter
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.resize import plan_budget, plan_rank, resize

BLOCKS, RANK, HIDDEN, MIDDLE, KEYS, WORDS = 32, 64, 4096, 14336, 1024, 128256
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (MIDDLE, HIDDEN), "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}  # fmt: skip
"""Outputs and inputs of a block's linear layers."""
LARGEST = {"adapter": 4 * RANK * MIDDLE, "model": 4 * WORDS * HIDDEN}
"""Bytes of the largest tensor in float32."""
PLANS = {
    "budget": lambda adapter: plan_budget(adapter, adapter.parameters // 4),
    "rank": lambda adapter: plan_rank(adapter, RANK // 4),
}


def main() -> None:
    """Write the adapter, resize it in processes of their own, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resize_large.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapter, result = Path(folder) / "adapter", {}
        write_random(adapter)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for name in PLANS:
                result[name] = pool.apply(_measure, (name, adapter, Path(folder) / name))
    result |= {"largest_bytes": LARGEST, "threads": torch.get_num_threads()}
    print(json.dumps(result, indent=1))
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def write_random(folder: Path) -> None:
    """Write the adapter, layer by layer."""
    layers = [
        _layer(f"model.layers.{block}.{name}", *shape, "meta")
        for block in range(BLOCKS)
        for name, shape in SHAPES.items()
    ]
    config = {"peft_type": "LORA", "target_modules": "all-linear"}
    adapter = SavedAdapter(folder=folder, config=config, layers=(), others={})
    write_adapter(adapter.with_layers(layers), folder, _filled(layers))


def _layer(name: str, outputs: int, inputs: int, device: str) -> SavedLayer:
    key = f"base_model.model.{name}"
    return SavedLayer(
        name=name,
        key_A=f"{key}.lora_A.weight",
        key_B=f"{key}.lora_B.weight",
        lora_A=torch.randn(RANK, inputs, device=device),
        lora_B=torch.randn(outputs, RANK, device=device),
        lora_alpha=RANK,
        use_rslora=False,
    )


def _filled(layers: Sequence[SavedLayer]) -> Iterator[SavedLayer]:
    torch.manual_seed(0)
    for layer in layers:
        yield _layer(layer.name, layer.outputs, layer.inputs, "cpu")


def _measure(name: str, folder: Path, output: Path) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _memory("VmRSS"), time.perf_counter()
    adapter = read_adapter(folder)
    resize(adapter, PLANS[name](adapter), output)
    seconds, peak = time.perf_counter() - start, _memory("VmHWM") - before
    ratios = {f"peak_by_{owner}": peak / size for owner, size in LARGEST.items()}
    return {"seconds": seconds, "peak_bytes": peak, **ratios}


def _memory(field: str) -> int:
    """Return a number of bytes from the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
