"""What dynamic ranks cost with several processes: seconds and bytes, against plain LoRA.

    python -m benchmarks.costs.processes

Trains a chain of square linear layers under DistributedDataParallel with 1, 2 and 4 processes on
this machine's CPUs (torchrun, gloo), with plain LoRA and with ranks that move at random, which take
steps in turn; and the same with 2 processes under FSDP2, and under DeepSpeed's ZeRO if installed.
Bytes are the sizes of tensors, which do not depend on the network: adapters, gradients and moments,
gradients that DistributedDataParallel reduces, and an event's collectives. All processes share the
CPUs.
Writes `benchmarks/results/processes.json` for `python -m benchmarks.costs.speed_report`.
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
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

LAYERS, WIDTH, RANK, TOKENS = 48, 256, 8, 1024
STEPS, EVENTS = 60, 5
COUNTS = (1, 2, 4)
SHARDED = ("fsdp2", *(f"zero{stage}" for stage in (1, 2, 3) if find_spec("deepspeed")))
BLOCK = 6
"""Layers per block, which FSDP2 gathers together."""


def main() -> None:
    """Measure each number of processes, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", type=Path, help="measure as one of the processes, write here")
    parser.add_argument("--engine", default="ddp", help="with --worker")
    options = parser.parse_args()
    if options.worker is not None:
        _work(options.worker, options.engine)
        return
    place = options.out / "processes.json"
    result: dict[str, Any] = {
        "layers": LAYERS,
        "width": WIDTH,
        "rank": RANK,
        "torch": torch.__version__,
        "processors": os.cpu_count(),
        "points": [_measure("ddp", count, place) for count in COUNTS],
        "sharded": {engine: _measure(engine, 2, place) for engine in SHARDED},
    }
    place.write_text(json.dumps(result, indent=1) + "\n")


def _measure(engine: str, count: int, place: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", "benchmarks.costs.processes"]
    command += ["--worker", str(place), "--engine", engine]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["DS_ACCELERATOR"] = "cpu"
    subprocess.run(command, check=True, env=environment)
    point: dict[str, Any] = json.loads(place.read_text())
    print(point, flush=True)
    return point


def _work(place: Path, engine: str) -> None:
    """Train as one of the processes; the first writes the result."""
    distributed.init_process_group("gloo")
    sent: Counter[str] = _count_bytes() if engine == "ddp" else Counter()
    plain, dynamic = _Run(engine, sent), _Run(engine, sent, moves=True)
    for step in range(STEPS):
        for run in (plain, dynamic) if step % 2 else (dynamic, plain):
            run.step()
    ratios = [ours / theirs for ours, theirs in zip(dynamic.seconds, plain.seconds, strict=True)]
    if distributed.get_rank() == 0:
        point = {
            "processes": distributed.get_world_size(),
            "step_seconds": {"plain": median(plain.seconds), "dynamic": median(dynamic.seconds)},
            "step_ratio": median(ratios),
            "event_seconds": median(dynamic.event_seconds),
        }
        if engine == "ddp":
            point["event_bytes"] = {
                name: median(event[name] for event in dynamic.event_bytes) for name in sent
            }
            point["bytes_ratio"] = {
                key: [part(dynamic.bytes[key]) / part(plain.bytes[key]) for part in (mean, max)]
                for key in plain.bytes
            }
        place.write_text(json.dumps(point))
    del run, plain, dynamic  # freed after the process group, they may wait forever for its threads
    gc.collect()
    distributed.destroy_process_group()


class _Run:
    """One of two runs that take steps in turn: plain LoRA, or one whose ranks move."""

    def __init__(self, engine: str, sent: Counter[str], *, moves: bool = False) -> None:
        from dynlora import DynamicLora, DynamicLoraConfig

        self.sent = sent
        self.model = _chain()
        self.zero = engine.startswith("zero")
        self.wrapped, self.optimizer = _wrapped(self.model, engine)
        config = DynamicLoraConfig(
            importance="random", total_steps=STEPS, events=EVENTS, hysteresis=0
        )
        self.dynamic = DynamicLora(self.model, self.optimizer, config) if moves else None
        self.seconds: list[float] = []
        """Per step, without the event."""
        self.event_seconds: list[float] = []
        self.event_bytes: list[Counter[str]] = []
        """Per event, by collective."""
        self.bytes: dict[str, list[int]] = {"held": [], "reduced": []}
        """Bytes per step of weights, gradients and moments, and of reduced gradients."""

    def step(self) -> None:
        """Take one step."""
        start = time.perf_counter()
        loss = self.wrapped(torch.randn(TOKENS // 16, 16, WIDTH)).square().mean()
        if self.zero:
            self.wrapped.backward(loss)
        else:
            loss.backward()
        if self.dynamic is not None:
            self.dynamic.observe()
        (self.wrapped if self.zero else self.optimizer).step()
        middle, before = time.perf_counter(), self.sent.copy()
        if isinstance(self.wrapped, DistributedDataParallel):
            self.count(self.wrapped)
        if self.dynamic is not None:
            events, begun = len(self.dynamic.history), time.perf_counter()
            self.dynamic.step()
            if len(self.dynamic.history) > events:
                self.event_seconds.append(time.perf_counter() - begun)
                self.event_bytes.append(self.sent - before)
        self.optimizer.zero_grad()
        self.seconds.append(middle - start)

    def count(self, wrapped: DistributedDataParallel) -> None:
        """Count the bytes that the step holds and reduces."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        states = [self.optimizer.state[p] for p in weights]
        moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]
        tensors = [*weights, *(p.grad for p in weights), *moments]
        self.bytes["held"].append(sum(tensor.nbytes for tensor in tensors))
        told = wrapped._get_ddp_logging_data()
        self.bytes["reduced"].append(int(told["total_parameter_size_bytes"]))


def _chain() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    blocks = [[nn.Linear(WIDTH, WIDTH) for _ in range(BLOCK)] for _ in range(LAYERS // BLOCK)]
    chain: Any = nn.Sequential(*(nn.Sequential(*layers) for layers in blocks))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=r"\d+\.\d+")
    return get_peft_model(chain, config).train()


def _wrapped(model: Any, engine: str) -> tuple[Any, Any]:
    """Return what an engine makes of the model, and the optimizer."""
    if engine == "fsdp2":
        for block in model.get_base_model():
            fully_shard(block)
        fully_shard(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-3)
    if engine == "ddp":
        return DistributedDataParallel(model), optimizer
    if engine == "fsdp2":
        return model, optimizer
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": TOKENS // 16,
        "zero_optimization": {"stage": int(engine[-1])},
        "zero_allow_untested_optimizer": True,
    }
    wrapped, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return wrapped, optimizer


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
