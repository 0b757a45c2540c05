"""llama.cpp's greedy continuations: a job file in, a file of tokens out.

Runs in a separate environment with xllamacpp, so it imports nothing of this repository:

    .venv-llamacpp/bin/python benchmarks/engines/engine_llamacpp.py JOB OUT
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import xllamacpp


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    result = {
        "versions": {"xllamacpp": version("xllamacpp")},
        "continuations": {
            name: _continue(job, adapter) for name, adapter in job["adapters"].items()
        },
    }
    Path(out).write_text(json.dumps(result))


def _continue(job: dict, adapter: str | None) -> list[dict]:
    server = xllamacpp.Server(_parameters(job["model"], adapter))
    return [_complete(server, prompt, job["new_tokens"]) for prompt in job["prompts"]]


def _parameters(model: str, adapter: str | None) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = -1
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    # Keys and values in float32 like everything else: the default is float16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return parameters


def _complete(server: xllamacpp.Server, prompt: list[int], new_tokens: int) -> dict:
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "n_probs": 1,
            "cache_prompt": False,
        }
    )
    steps = answer["choices"][0]["logprobs"]["content"]
    return {
        "tokens": [step["id"] for step in steps],
        "logprobs": [step["logprob"] for step in steps],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
