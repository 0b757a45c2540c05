"""Run folders written by hand, with what `dynlora train` would leave in them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dynlora.history import Event
from tests.jobs import write_rows
from tests.unit.events import make_event

KINDS = ("attention.self.query", "attention.self.value", "output.dense")


def block_names(blocks: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """Return names of layers in blocks, and of a pooler behind them."""
    inside = [f"bert.encoder.layer.{block}.{kind}" for block in range(blocks) for kind in kinds]
    return [*inside, "bert.pooler.dense"]


def make_events(names: Sequence[str], steps: Sequence[int], *, start: int = 8) -> list[Event]:
    """Return events at which every second layer gains a rank and all others lose one."""
    events, before = [], dict.fromkeys(names, start)
    for number, step in enumerate(steps):
        after = {
            name: max(1, rank + (1 if (place + number) % 3 else -2))
            for place, (name, rank) in enumerate(before.items())
        }
        events.append(make_event(step, before, after, scores=dict.fromkeys(names, 1.0)))
        before = after
    return events


def run_values(**changes: Any) -> dict[str, Any]:
    """Return the values of `run.json`, some replaced; None leaves a key out."""
    values = {
        "status": "finished",
        "written": "2026-11-25T01:00:00+00:00",
        "task": "regression",
        "method": "dynamic",
        "seed": 0,
        "versions": {"python": "3.11.7", "torch": "2.8.0"},
        "machine": {"platform": "Linux", "cpus": 2},
        "rows": {"train": 400, "validation": 100},
        "budget": 10_000,
        "metrics_before": {"pearson": 0.125, "loss": 0.75},
        "metrics_after": {"pearson": 0.625, "loss": 0.5},
        "steps": 100,
        "parameters": {"start": 9_000, "peak": 10_000, "end": 9_876},
        "seconds": {"training_steps": 20.0, "dynamic_part": 0.5, "evaluation": 3.0},
        "peak_memory_bytes": 3 * 2**30,
        "peak_gpu_memory_bytes": None,
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def config_values(**changes: Any) -> dict[str, Any]:
    return {
        "output": "runs/it",
        "method": "dynamic",
        "model": {"name": "some/model", "path": None},
        "data": {"path": "rows", "text": "text"},
        "lora": {"r": 8, "lora_alpha": 16.0},
        "training": {"learning_rate": 1e-3, "seed": 0},
    } | changes


METRICS: Sequence[Mapping[str, Any]] = (
    {"step": 0, "eval_loss": 0.75, "eval_pearson": 0.125, "eval_runtime": 1.5},
    {"step": 10, "loss": 0.7, "learning_rate": 1e-3},
    {"step": 20, "loss": None},
    {"step": 30, "loss": 0.6},
    {"step": 100, "eval_loss": 0.5, "eval_pearson": 0.625, "eval_runtime": 1.5},
    {"step": 100, "train_runtime": 21.0, "train_loss": 0.6},
)


def write_run(
    folder: Path,
    *,
    events: Sequence[Event] = (),
    run: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, Any]] = METRICS,
) -> Path:
    """Write a run's folder and return it; final ranks follow the events unless given."""
    values = run_values() if run is None else dict(run)
    if events and values["status"] == "finished":
        last = {name: layer.rank_after for name, layer in events[-1].layers.items()}
        values.setdefault("final_ranks", last)
    write_rows(folder / "metrics.jsonl", metrics)
    (folder / "run.json").write_text(json.dumps(values))
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config or config_values())))
    if events:
        write_rows(folder / "ranks.jsonl", [event.to_dict() for event in events])
    return folder
