"""ONNX Runtime's greedy continuations: a job file in, a file of tokens out.

.venv-onnx/bin/python benchmarks/engines/engine_onnx.py JOB OUT
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from forward_only import Logits, run_job


def load(file: str) -> Logits:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # a model with factors as inputs has a warning for each
    session = onnxruntime.InferenceSession(file, options)
    beside, adapter = Path(file).with_name("adapter.onnx_adapter"), onnxruntime.LoraAdapter()
    if switched := beside.is_file():
        adapter.Load(str(beside))

    def logits(ids: list[int]) -> np.ndarray:
        run = onnxruntime.RunOptions()
        if switched:
            run.add_active_adapter(adapter)  # does not keep it alive
        tokens = np.array([ids])
        inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        return session.run(["logits"], inputs, run)[0][0]

    return logits


if __name__ == "__main__":
    run_job(*sys.argv[1:], "onnxruntime", load)
