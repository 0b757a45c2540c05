"""ExecuTorch's greedy continuations: a job file in, a file of tokens out.

.venv-executorch/bin/python benchmarks/engines/engine_executorch.py JOB OUT
"""

import sys

import numpy as np
import torch
from executorch.runtime import Runtime
from forward_only import Logits, run_job


def load(file: str) -> Logits:
    method = Runtime.get().load_program(file).load_method("forward")

    def logits(ids: list[int]) -> np.ndarray:
        return method.execute([torch.tensor([ids])])[0][0].numpy()

    return logits


if __name__ == "__main__":
    run_job(*sys.argv[1:], "executorch", load)
