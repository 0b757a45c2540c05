"""Planted needs: the gain of the method and of each setting where the answer is known.

Needs are concentrated in two of 24 layers, or spread over all. Uniform ranks, the oracle's ranks
from the start, and the defaults are each tuned for learning rate and scale on separate seeds. Then
every variant, the defaults with one changed setting, runs with the tuned values of the defaults on
half of the seeds. Losses are relative to uniform ranks on the same seeds. Writes one JSON, updated
after each variant.

    python -m benchmarks.planted --out benchmarks/results
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlora import DynamicLoraConfig
from tests.planted import RANK, STEPS, Planted, concentrated, oracle_ranks, spread

SETTINGS = ((6e-3, 2.0), (1.2e-2, 2.0), (2.4e-2, 2.0), (1.2e-2, 0.5), (2.4e-2, 0.5), (4.8e-2, 0.5))
"""Learning rates and scales to try."""
TUNING_SEEDS = (100, 101)
UNIFORM: dict[str, Any] = {"importance": "uniform"}
VARIANTS: dict[str, dict[str, Any]] = {
    "importance=spectral": {"importance": "spectral"},
    "importance=sensitivity": {"importance": "sensitivity"},
    "importance=gradient_norm": {"importance": "gradient_norm"},
    "importance=random": {"importance": "random"},
    "temperature=1": {"temperature": 1.0},
    "uniform_mix=0": {"uniform_mix": 0.0},
    "uniform_mix=0.5": {"uniform_mix": 0.5},
    "shrink_tolerance=0.2": {"shrink_tolerance": 0.2},
    "max_rank=4r": {"max_rank": 4 * RANK},
    "events 15-50 %": {"first_event": 0.15, "last_event": 0.5},
    "feature_weight=0.5": {"feature_weight": 0.5},
    "layer_weights": {"layer_weights": True},
}
TASKS = {"concentrated": concentrated, "spread": spread}
METHODS = {
    "concentrated": ("uniform", "oracle", "default"),
    "spread": ("uniform", "default"),
}
"""If needs are spread, the oracle's ranks are uniform."""


def main() -> None:
    """Run everything on all seeds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    result: dict[str, Any] = {}
    for kind, methods in METHODS.items():
        tuned = {name: _tune(kind, name) for name in methods}
        losses = {
            name: [_train(kind, s, name, setting) for s in seeds] for name, setting in tuned.items()
        }
        result[kind] = _compared(losses) | {"learning_rate_and_scale": tuned}
        _write(options.out, result)
    setting = result["concentrated"]["learning_rate_and_scale"]["default"]
    some = range(options.seeds // 2)
    uniform = [_train("concentrated", s, "uniform", setting) for s in some]
    variants: dict[str, Any] = {"learning_rate_and_scale": setting}
    result["variants"] = variants
    for name in ("default", *VARIANTS):
        mine = [_train("concentrated", s, name, setting) for s in some]
        variants[name] = {"loss_over_uniform": _ratio(mine, uniform), "losses": mine}
        _write(options.out, result)
        print(f"{name:30} {variants[name]['loss_over_uniform']:.3f}", flush=True)


def _tune(kind: str, name: str) -> tuple[float, float]:
    """Return the learning rate and scale with the lowest geometric mean of final losses."""
    found = {
        setting: _mean([_train(kind, seed, name, setting) for seed in TUNING_SEEDS])
        for setting in SETTINGS
    }
    return min(found, key=lambda setting: found[setting])


def _train(kind: str, seed: int, name: str, setting: tuple[float, float]) -> float:
    """Return the final loss."""
    rate, scale = setting
    settings = UNIFORM if name in ("uniform", "oracle") else VARIANTS.get(name, {})
    ranks = oracle_ranks(seed) if name == "oracle" else None
    task: Planted = TASKS[kind](seed, ranks, scale=scale)
    _, loss, _ = task.train(DynamicLoraConfig(total_steps=STEPS, **settings), lr=rate)
    return loss


def _compared(losses: dict[str, list[float]]) -> dict[str, Any]:
    """Return losses, their ratio to uniform ranks, and the part of the oracle's gain."""
    found: dict[str, Any] = {
        name: {"loss_over_uniform": _ratio(mine, losses["uniform"]), "losses": mine}
        for name, mine in losses.items()
    }
    if "oracle" in losses:
        gain = 1 - found["default"]["loss_over_uniform"]
        found["part_of_oracle_gain"] = gain / (1 - found["oracle"]["loss_over_uniform"])
    return found


def _ratio(losses: Sequence[float], others: Sequence[float]) -> float:
    return _mean(losses) / _mean(others)


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _write(folder: Path, result: dict[str, Any]) -> None:
    (folder / "planted.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
