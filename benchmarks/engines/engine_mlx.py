"""MLX-LM's greedy continuations: a job file in, a file of tokens out.

Runs in a separate environment with mlx-lm, so it imports nothing of this repository:

    .venv-mlx/bin/python benchmarks/engines/engine_mlx.py JOB OUT
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import generate_step


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    result = {
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
        "continuations": {
            name: _continue(job, adapter) for name, adapter in job["adapters"].items()
        },
    }
    Path(out).write_text(json.dumps(result))


def _continue(job: dict, adapter: str | None) -> list[dict]:
    model, tokenizer = load(job["model"], adapter_path=adapter)
    return [
        _complete(model, prompt, job["new_tokens"], tokenizer.eos_token_ids)
        for prompt in job["prompts"]
    ]


def _complete(model: object, prompt: list[int], new_tokens: int, ends: set[int]) -> dict:
    tokens, logprobs = [], []
    for token, step in generate_step(mx.array(prompt), model, max_tokens=new_tokens):
        tokens.append(int(token))
        logprobs.append(step[tokens[-1]].item())
        if tokens[-1] in ends:
            break
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    main(*sys.argv[1:])
