"""Lower a merged language model to a program of ExecuTorch: a folder in, a .pte file out.

Runs in a separate environment with executorch and transformers:

    .venv-executorch/bin/python benchmarks/engines/lower_executorch.py MERGED FILE

XNNPACK computes the linear layers in float32 on the CPU. The program maps `input_ids` of shape
(1, length) to logits, without a cache of keys and values.
"""

import sys
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from transformers import AutoModelForCausalLM

LONGEST = 512  # tokens; the program reserves memory for them


def main(merged: str, file: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    model.config.use_cache = False
    program = torch.export.export(
        model,
        (),
        {"input_ids": torch.ones(1, 3, dtype=torch.long)},
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=LONGEST)}},
    )
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    Path(file).write_bytes(lowered.to_executorch().buffer)


if __name__ == "__main__":
    main(*sys.argv[1:])
