"""What events cost with several processes: seconds, and bytes sent per process.

    python -m benchmarks.processes

Trains a chain of square linear layers under DistributedDataParallel with 1, 2 and 4 processes on
this machine's CPUs (torchrun, gloo). Ranks move at random. Bytes are the sizes of the tensors that
one process sends to collectives, which do not depend on the network. All processes share the CPUs.
Writes `benchmarks/results/processes.json` for `python -m benchmarks.speed_report`.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

LAYERS, WIDTH, RANK, TOKENS = 48, 256, 8, 256
STEPS, EVENTS = 40, 5
COUNTS = (1, 2, 4)


def main() -> None:
    """Measure each number of processes, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", type=Path, help="measure as one of the processes, write here")
    options = parser.parse_args()
    if options.worker is not None:
        _work(options.worker)
        return
    result: dict[str, Any] = {
        "layers": LAYERS,
        "width": WIDTH,
        "rank": RANK,
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "points": [_measure(count, options.out / "processes.json") for count in COUNTS],
    }
    (options.out / "processes.json").write_text(json.dumps(result, indent=1) + "\n")


def _measure(count: int, place: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", "benchmarks.processes", "--worker", str(place)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, env=environment)
    point: dict[str, Any] = json.loads(place.read_text())
    print(point, flush=True)
    return point


def _work(place: Path) -> None:
    """Train as one of the processes; the first writes the result."""
    from dynlora import DynamicLora, DynamicLoraConfig

    distributed.init_process_group("gloo")
    sent = _count_bytes()
    seconds = {}
    for name in ("plain", "dynamic"):
        model, optimizer = _chain()
        config = DynamicLoraConfig(
            importance="random", total_steps=STEPS, events=EVENTS, hysteresis=0, mode="static"
        )
        dynamic = DynamicLora(model, optimizer, config) if name == "dynamic" else None
        wrapped = DistributedDataParallel(model)
        steps, events, bytes_by_event = [], [], []
        for _ in range(STEPS):
            start = time.perf_counter()
            wrapped(torch.randn(TOKENS // 16, 16, WIDTH)).square().mean().backward()
            if dynamic is not None:
                dynamic.observe()
            optimizer.step()
            before, there = sent.total(), 0 if dynamic is None else len(dynamic.history)
            middle = time.perf_counter()
            if dynamic is not None:
                dynamic.step()
            end = time.perf_counter()
            if dynamic is not None and len(dynamic.history) > there:
                events.append(end - middle)
                bytes_by_event.append(sent.total() - before)
            else:
                steps.append(end - start)
            optimizer.zero_grad()
        seconds[name] = median(steps)
    if distributed.get_rank() == 0:
        point = {
            "processes": distributed.get_world_size(),
            "step_seconds": seconds,
            "event_seconds": median(events),
            "event_bytes": median(bytes_by_event),
        }
        place.write_text(json.dumps(point))
    del wrapped  # freed after the process group, it may wait forever for Gloo's threads
    gc.collect()
    distributed.destroy_process_group()


def _chain() -> tuple[Any, AdamW]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    chain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[str(k) for k in range(LAYERS)])
    model = get_peft_model(chain, config).train()
    return model, AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


def _count_bytes() -> Counter[str]:
    """Count the bytes that this process sends to collectives, except DDP's own reductions."""
    sent: Counter[str] = Counter()

    def counted(name: str, original: Callable[..., Any], given: Callable[..., Tensor]) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            tensor = given(*args)
            sent[name] += tensor.numel() * tensor.element_size()
            return original(*args, **named)

        return call

    def first(*args: Tensor) -> Tensor:
        return args[0]

    def second(*args: Any) -> Tensor:
        tensor: Tensor = args[1]
        return tensor

    for name, given in (("all_reduce", first), ("broadcast", first), ("all_gather", second)):
        setattr(distributed, name, counted(name, getattr(distributed, name), given))
    return sent


if __name__ == "__main__":
    main()
