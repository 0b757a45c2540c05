"""Greedy continuations of models without a cache of keys and values: one call per prompt.

The model reads a prompt with PEFT's continuation. As long as its own choices are PEFT's, they are
its greedy continuation; the first other choice ends it, because the texts part there.
Imports nothing of this repository, because scripts in other environments import it.
"""

import json
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

Logits = Callable[[list[int]], np.ndarray]
"""Maps n token numbers to logits of shape (n, vocabulary)."""


def run_job(job_file: str, out: str, package: str, load: Callable[[str], Logits]) -> None:
    """Write continuations of each form, and its file size, time per call and memory.

    Args:
        job_file: JSON with `prompts`, `expected` (PEFT's continuations) and `files` by form.
        out: JSON to write.
        package: The engine's package.
        load: Loads a model from a file.
    """
    job = json.loads(Path(job_file).read_text())
    made, measured = {}, {}
    for form, file in job["files"].items():
        logits = load(file)
        start = time.perf_counter()
        made[form] = [
            continue_by_forward(logits, *pair)
            for pair in zip(job["prompts"], job["expected"], strict=True)
        ]
        seconds = time.perf_counter() - start
        beside = Path(file).parent.glob(f"{Path(file).name}*")  # ONNX has weights in another file
        measured[form] = {
            "bytes": sum(path.stat().st_size for path in beside),
            "seconds_per_call": seconds / len(made[form]),
            "peak_bytes_so_far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    result = {
        "versions": {package: version(package)},
        "measured": measured,
        "continuations": made,
    }
    Path(out).write_text(json.dumps(result))


def continue_by_forward(logits: Logits, prompt: list[int], expected: list[int]) -> dict:
    """Return `tokens` and `logprobs` of a continuation, as `compare` reads them."""
    rows = logits(prompt + expected[:-1])[len(prompt) - 1 :].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    choices = rows.argmax(axis=1)
    differing = np.flatnonzero(choices != expected)
    count = differing[0] + 1 if len(differing) else len(expected)
    return {"tokens": choices[:count].tolist(), "logprobs": rows.max(axis=1)[:count].tolist()}
