"""How costs grow with the number of adapted layers, their rank and their width.

    python -m benchmarks.costs.scale

A model is a chain of square linear layers with a batch of 256 tokens. For each size, one process
times the frozen chain, PEFT LoRA and dynamic ranks in turn. It also times the parts of dynlora: the
observation of gradients, the sampling of inputs, and events. Scores are random, so that ranks move
if there are several layers. The fitted exponent of a cost is 1 if it grows linearly. A last series
times fused and PEFT's forwards in calls of all sizes, including sizes below
`fused.LEAST_ELEMENTS`. Writes `benchmarks/results/scale.json` for
`python -m benchmarks.costs.speed_report`.
"""

import argparse
import gc
import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.fused import layers as fused
from dynlora.schedule import is_sampled

TOKENS = 256
STEPS = 32
EVENTS = 4
WARM_UP = 2
SERIES: dict[str, list[dict[str, int]]] = {
    "layers": [{"layers": n, "width": 64, "rank": 8} for n in (24, 80, 240, 800, 2400)],
    "rank": [{"layers": 24, "width": 512, "rank": r} for r in (4, 16, 64, 256)],
    "width": [{"layers": 1, "width": w, "rank": 8} for w in (64, 256, 1024, 4096, 8192)],
}
CALL_WIDTHS, CALL_RANKS, CALL_ROWS = (64, 256, 768), (8, 32), (16, 64, 256, 1024)
CALL_LAYERS, CALL_STEPS = 6, 24
COSTS = ("floor", "lora", "dynamic", "observe", "sample", "event")


def main() -> None:
    """Time every size, fit, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    series = {}
    for grows, sizes in SERIES.items():
        points = []
        for size in sizes:
            points.append(size | _measure(**size))
            print(grows, points[-1], flush=True)
            gc.collect()
        series[grows] = {"points": points, "exponents": _exponents(grows, points)}
    fused.LEAST_ELEMENTS = 0
    calls = [
        {"width": width, "rank": rank, "rows": rows, "ratio": _fused_over_peft(width, rank, rows)}
        for width in CALL_WIDTHS
        for rank in CALL_RANKS
        for rows in CALL_ROWS
    ]
    result = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "series": series,
        "calls": calls,
    }
    (options.out / "scale.json").write_text(json.dumps(result, indent=1) + "\n")


def _measure(*, layers: int, width: int, rank: int) -> dict[str, float]:
    """Return the median seconds of each cost."""
    torch.manual_seed(0)
    floor = _chain(layers, width)
    for weight in floor.parameters():
        weight.requires_grad_(False)
    lora, lora_optimizer = _adapted(layers, width, rank)
    model, optimizer = _adapted(layers, width, rank)
    config = DynamicLoraConfig(
        importance="random", total_steps=STEPS, first_event=0.25, last_event=1.0, events=EVENTS
    )
    controller = DynamicLora(model, optimizer, config)
    seconds: dict[str, list[float]] = {name: [] for name in COSTS}
    for _ in range(STEPS):
        seconds["floor"].append(step(_loss_of(floor, width), None))
        seconds["lora"].append(step(_loss_of(lora, width), lora_optimizer))
        seconds["dynamic"].append(
            dynamic_step(_loss_of(model, width), optimizer, controller, seconds)
        )
    rare = ("sample", "event")
    return {n: median(v if n in rare else v[WARM_UP:]) for n, v in seconds.items()}


def _fused_over_peft(width: int, rank: int, rows: int) -> float:
    """Return the median ratio of paired forward and backward passes."""
    torch.manual_seed(0)
    peft, _ = _adapted(CALL_LAYERS, width, rank)
    ours, _ = _adapted(CALL_LAYERS, width, rank)
    fused.FusedLora(ours)
    ratios = []
    for number in range(CALL_STEPS):
        pair = [(peft, 0), (ours, 1)]
        seconds = [0.0, 0.0]
        for model, place in pair if number % 2 else reversed(pair):
            seconds[place] = step(_loss_of(model, width, rows), None)
        ratios.append(seconds[1] / seconds[0])
    return median(ratios[WARM_UP:])


def _chain(layers: int, width: int) -> nn.Sequential:
    parts = OrderedDict((f"layer{n}", nn.Linear(width, width)) for n in range(layers))
    chain = nn.Sequential(parts)
    if layers > 1:  # or what passes through thousands of layers would vanish
        for layer in chain:
            nn.init.orthogonal_(layer.weight)  # type: ignore[arg-type]
    return chain


def _adapted(layers: int, width: int, rank: int) -> tuple[nn.Module, AdamW]:
    targets = [f"layer{n}" for n in range(layers)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    model = get_peft_model(_chain(layers, width), config).train()  # type: ignore[arg-type]
    return model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _loss_of(model: nn.Module, width: int, rows: int = TOKENS) -> Callable[[], Tensor]:
    """Return a forward on new random inputs."""
    inputs = torch.randn(rows, width, requires_grad=True)
    return lambda: model(inputs).square().mean()


def step(forward: Callable[[], Tensor], optimizer: AdamW | None) -> float:
    """Take a step on the loss that `forward` returns, and return its seconds."""
    start = time.perf_counter()
    forward().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def dynamic_step(
    forward: Callable[[], Tensor],
    optimizer: AdamW,
    controller: DynamicLora,
    seconds: dict[str, list[float]],
) -> float:
    """Take a step; add the seconds of observing, sampling and an event, if there was one."""
    sampled = is_sampled(controller._timetable.events, controller._step)
    booked = controller.seconds
    start = time.perf_counter()
    loss = forward()
    if sampled:
        seconds["sample"].append(controller.seconds - booked)
    loss.backward()
    before = time.perf_counter()
    controller.observe()
    seconds["observe"].append(time.perf_counter() - before)
    optimizer.step()
    events, before = len(controller.history), time.perf_counter()
    controller.step()
    if len(controller.history) > events:
        seconds["event"].append(time.perf_counter() - before)
    optimizer.zero_grad()
    return time.perf_counter() - start


def _exponents(grows: str, points: list[dict[str, Any]]) -> dict[str, float]:
    """Return the exponent of each cost: the slope of its logarithm over that of the size."""
    xs = [math.log(point[grows]) for point in points]
    middle = sum(xs) / len(xs)
    slopes = {}
    for name in COSTS:
        ys = [math.log(point[name]) for point in points]
        products = ((x - middle) * y for x, y in zip(xs, ys, strict=True))
        slopes[name] = sum(products) / sum((x - middle) ** 2 for x in xs)
    return slopes


if __name__ == "__main__":
    main()
