"""Seconds and peak memory of `resize` on a large adapter: Llama-3.1-8B, all linear layers, r = 64.

    python -m benchmarks.costs.resize_large

The weights are random, in float32. A budget of a quarter of the parameters needs two passes over
the layers. Memory is the highest resident set above that of the imported process, in a process of
its own. Writes `benchmarks/results/resize_large.json`.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.formats import WEIGHTS
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.reader import read_adapter
from dynlora.adapter_files.resize import plan_budget, resize
from dynlora.adapter_files.writer import write_adapter

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


def main() -> None:
    """Write the adapter, resize it in a process of its own, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resize_large.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        write_random(adapter)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(_measure, (adapter, Path(folder) / "resized"))
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


def _measure(folder: Path, output: Path) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start, used = _memory("VmRSS"), time.perf_counter(), time.process_time()
    adapter = read_adapter(folder)
    resize(adapter, plan_budget(adapter, adapter.parameters // 4), output)
    peak = _memory("VmHWM") - before
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - used,
        "file_bytes": (folder / WEIGHTS).stat().st_size,
        "peak_bytes": peak,
        "peak_by_largest": {owner: peak / size for owner, size in LARGEST.items()},
    }


def _memory(field: str) -> int:
    """Return a number of bytes from the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
