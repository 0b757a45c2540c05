"""vLLM's greedy continuations: a job file in, a file of tokens out.

Runs in vLLM's own environment, so it imports nothing of this repository:

    .venv-vllm/bin/python benchmarks/engines/engine_vllm.py JOB OUT
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as `max_lora_rank`."""


def main(job_file: str, out: str) -> None:
    job = json.loads(Path(job_file).read_text())
    engine = LLM(
        job["model"],
        dtype="float32",
        enable_lora=True,
        max_lora_rank=_accepted(job["rank"]),
        enforce_eager=True,
        max_model_len=256,
        max_loras=2,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    adapters = {
        name: path and LoRARequest(name, number, path)
        for number, (name, path) in enumerate(job["adapters"].items(), start=1)
    }
    continued = {name: _continue(engine, job, adapter) for name, adapter in adapters.items()}
    if {"uniform", "doubled"} <= adapters.keys():
        twice = job | {"prompts": [prompt for prompt in job["prompts"] for _ in range(2)]}
        switched = [adapters["uniform"], adapters["doubled"]] * len(job["prompts"])
        continued["switched"] = _continue(engine, twice, switched)[::2]
    slots = engine.apply_model(_slot_bytes)[0]
    result = {
        "versions": {"vllm-cpu": vllm.__version__, "torch": torch.__version__},
        "measured": {"bytes_per_adapter_slot": {str(_accepted(job["rank"])): slots // 2}},
        "continuations": continued,
    }
    Path(out).write_text(json.dumps(result))


def _accepted(rank: int) -> int:
    """Return the smallest `max_lora_rank` that vLLM accepts and that fits."""
    return min(accepted for accepted in MAX_LORA_RANKS if accepted >= rank)


def _slot_bytes(model: torch.nn.Module) -> int:
    """Return the bytes that vLLM holds for adapters, whatever their own ranks."""
    stacks = [
        stack
        for module in model.modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
        for stack in getattr(module, name, ())
    ]
    return sum(stack.nbytes for stack in stacks)


def _continue(engine: LLM, job: dict, adapters: object) -> list[dict]:
    """Continue prompts with an adapter, with none, or with one for each prompt."""
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=job["new_tokens"], logprobs=0),
        lora_request=adapters,
        use_tqdm=False,
    )
    completions = [output.outputs[0] for output in outputs]
    return [
        {
            "tokens": list(completion.token_ids),
            "logprobs": [
                step[token].logprob
                for token, step in zip(completion.token_ids, completion.logprobs, strict=True)
            ],
        }
        for completion in completions
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
