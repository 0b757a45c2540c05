"""What moving ranks costs in large models, from one and two transformer blocks of each shape.

    python -m benchmarks.costs.blocks

Blocks have random weights in float32, a batch of 512 tokens and adapters of rank 16 on all linear
layers. Plain LoRA and dynamic ranks take steps in turn. The batch is always the same, so that its
gradients agree and ranks move. Seconds of all blocks, without embeddings and head, are on the line
through those of one and two. `llama-1b` is also measured whole, with both, to check this. There is
one process at a time, for its memory.
Writes `benchmarks/results/blocks.json` for `python -m benchmarks.costs.speed_report`.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import AutoModel, AutoModelForCausalLM

from benchmarks.costs.scale import dynamic_step, step
from benchmarks.costs.speed_models import MODELS, Shape
from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.schedule import event_steps, is_observed, is_sampled

RANK, TOKENS = 16, 512
STEPS, EVENTS, WARM_UP = 9, 4, 1
RUN = 1000
"""Optimizer steps of the run whose dynamic part is reported, at the default settings."""
BLOCK_WORDS = 256
"""Vocabulary of a single block: its embeddings cost nothing."""
SHAPES = ("llama-1b", "llama-8b", "qwen-14b", "llama-70b")
WHOLE = "llama-1b"


def main() -> None:
    """Measure all shapes in processes of their own, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--shape", choices=SHAPES, help="measure this one only, and print it")
    parser.add_argument("--count", type=int, help="blocks; all, with head, if it is left out")
    options = parser.parse_args()
    if options.shape is not None:
        print(json.dumps(_measure(options.shape, options.count)))
        return
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rank": RANK,
        "tokens": TOKENS,
        "run": RUN,
        "shapes": {shape: _shape(shape) for shape in SHAPES},
        "whole": {WHOLE: _alone("--shape", WHOLE)},
    }
    (options.out / "blocks.json").write_text(json.dumps(result, indent=1) + "\n")


def _shape(name: str) -> dict[str, Any]:
    """Return the measurements of one block, and seconds and dynamic part of all blocks."""
    one, two = (_alone("--shape", name, "--count", count) for count in ("1", "2"))
    layers = MODELS[name].values["num_hidden_layers"]  # type: ignore[union-attr]
    seconds = {
        cost: first + (layers - 1) * (two["seconds"][cost] - first)
        for cost, first in one["seconds"].items()
    }
    return one | {"blocks": layers, "seconds": seconds, "dynamic_part": dynamic_part(seconds)}


def _alone(*given: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.costs.blocks", *given]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    point: dict[str, Any] = json.loads(found.splitlines()[-1])
    print(given, point, flush=True)
    return point


def _measure(name: str, count: int | None) -> dict[str, Any]:
    """Return the seconds of each cost, parameters and bytes."""
    shape = MODELS[name]
    assert isinstance(shape, Shape)
    base = _base(shape, count)
    weights = {id(weight): weight for weight in chain(base.parameters(), base.buffers())}
    models = [_adapted(copy.deepcopy(base, dict(weights))) for _ in range(2)]
    (lora, lora_optimizer), (model, optimizer) = models
    config = DynamicLoraConfig(
        total_steps=STEPS, first_event=0.5, last_event=1.0, events=EVENTS, hysteresis=0
    )
    controller = DynamicLora(model, optimizer, config)
    lora_loss, loss = (_loss_of(each, base.config.vocab_size) for each in (lora, model))
    found: dict[str, list[float]] = {"observe": [], "sample": [], "event": []}
    pairs = []
    for _ in range(STEPS):
        ours = dynamic_step(loss, optimizer, controller, found)
        pairs.append((ours, step(lora_loss, lora_optimizer)))
    plain = median(theirs for _, theirs in pairs[WARM_UP:])
    seconds = {name: median(values) for name, values in found.items()}
    seconds |= {"event": max(found["event"]), "lora": plain}  # only some events move ranks
    return {
        "parameters": sum(weight.numel() for weight in base.parameters() if weight.dim() > 1),
        "seconds": seconds,
        "step_ratio": median(ours / theirs for ours, theirs in pairs[WARM_UP:]),
        "moved": sum(
            any(layer.rank_before != layer.rank_after for layer in event.layers.values())
            for event in controller.history
        ),
        "bytes": {
            "lora": _bytes(lora_optimizer),
            "dynamic": _bytes(optimizer),
            "observation": _observation_bytes(controller.state_dict()),
        },
    }


def _base(shape: Shape, count: int | None) -> Any:
    """Return a model of so many blocks, or a causal language model of all blocks."""
    fewer = {} if count is None else {"num_hidden_layers": count, "vocab_size": BLOCK_WORDS}
    config = shape.config(**shape.values | fewer)
    torch.manual_seed(0)
    form = AutoModelForCausalLM if count is None else AutoModel
    return form.from_config(config, dtype=torch.float32)


def _adapted(base: Any) -> tuple[Any, AdamW]:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    # Blocks above the first one also compute the gradient of their input.
    model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    return model, AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _loss_of(model: nn.Module, words: int) -> Callable[[], Tensor]:
    ids = torch.randint(words, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def forward() -> Tensor:
        output: Tensor = model(input_ids=ids, use_cache=False)[0]
        return output.square().mean()

    return forward


def dynamic_part(seconds: dict[str, float]) -> float:
    """Return the part of a run's time that observing, sampling and events take."""
    events = event_steps(DynamicLoraConfig(total_steps=RUN))
    before = range(events[-1])
    observed = sum(is_observed(events, number) for number in before)
    sampled = sum(is_sampled(events, number) for number in before)
    costs = (seconds["observe"] * observed, seconds["sample"] * sampled)
    spent = sum(costs) + seconds["event"] * len(events)
    return spent / (spent + seconds["lora"] * RUN)


def _bytes(optimizer: AdamW) -> int:
    """Return the bytes of adapters, gradients and moments."""
    total = 0
    for weight, state in optimizer.state.items():
        total += 2 * weight.nbytes + state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    return total


def _observation_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(_observation_bytes, state.values()))
    return sum(map(_observation_bytes, state)) if isinstance(state, (list, tuple)) else 0


if __name__ == "__main__":
    main()
