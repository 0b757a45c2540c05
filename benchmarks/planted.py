"""Planted needs: what each choice of the method is worth where need is concentrated.

Every variant is the default configuration with one setting changed; its final loss is divided by
that of uniform ranks on the same seed. One JSON out, from which `docs/log.md` quotes.

    python -m benchmarks.planted --out benchmarks/results
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dynlora import DynamicLoraConfig
from tests.planted import RANK, STEPS, Planted

LEARNING_RATE = 3e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "importance=spectral": {"importance": "spectral"},
    "importance=sensitivity": {"importance": "sensitivity"},
    "importance=gradient_norm": {"importance": "gradient_norm"},
    "importance=activation_ratio": {"importance": "activation_ratio"},
    "importance=random": {"importance": "random"},
    "temperature=1": {"temperature": 1.0},
    "temperature=0.33": {"temperature": 0.33},
    "uniform_mix=0.25": {"uniform_mix": 0.25},
    "shrink_tolerance=0.1": {"shrink_tolerance": 0.1},
    "max_rank=2r": {"max_rank": 2 * RANK},
    "max_rank=none": {"max_rank": 1000},
    "feature_weight=0.5": {"feature_weight": 0.5},
    "layer_weights": {"layer_weights": True},
}
METRICS = ("signal", "spectral", "sensitivity", "gradient_norm", "activation_ratio")


def main() -> None:
    """Run all variants on all seeds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    uniform = {s: _train(s, {"importance": "uniform"}) for s in range(options.seeds)}
    result: dict[str, Any] = {"uniform_losses": [uniform[s][0] for s in uniform], "variants": {}}
    for name, settings in VARIANTS.items():
        runs = [_train(seed, settings) for seed in range(options.seeds)]
        ratios = [loss / uniform[seed][0] for seed, (loss, _) in enumerate(runs)]
        result["variants"][name] = {
            "loss_over_uniform": math.exp(sum(map(math.log, ratios)) / len(ratios)),
            "each": ratios,
            "part_of_moved_budget_to_planted": [part for _, part in runs],
        }
        print(f"{name:30} {result['variants'][name]['loss_over_uniform']:.3f}", flush=True)
    result["places_of_planted"] = {seed: _places(seed) for seed in range(options.seeds)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planted.json").write_text(json.dumps(result, indent=1) + "\n")


def _train(seed: int, settings: dict[str, Any]) -> tuple[float, float]:
    """Return the final loss, and which part of the budget moved went to the planted layers."""
    task = Planted(seed)
    config = DynamicLoraConfig(total_steps=STEPS, **settings)
    dynamic, loss, _ = task.train(config, lr=LEARNING_RATE)
    moves = {x.name: (dynamic.ranks[x.name] - RANK) * x.cost for x in dynamic._layers}
    freed = -sum(move for move in moves.values() if move < 0)
    return loss, sum(moves[name] for name in task.names) / freed if freed else 0.0


def _places(seed: int) -> dict[str, list[int]]:
    """Return the planted layers' places in each metric's order, at the middle of a uniform run."""
    task = Planted(seed)
    config = DynamicLoraConfig(importance="uniform", total_steps=STEPS)
    _, _, scores = task.train(config, lr=LEARNING_RATE, steps=STEPS // 2, metrics=METRICS)
    places = {}
    for metric, values in scores.items():
        order = sorted(values, key=lambda name: -values[name])
        places[metric] = sorted(order.index(name) + 1 for name in task.names)
    return places


if __name__ == "__main__":
    main()
