"""The gain of single parts of the method: recorded runs of a study, repeated without a part.

Repeats recorded `dynamic` runs with their own configuration and one of `CHANGES`.
Writes one JSON per task, updated after each run.

    python -m benchmarks.recovery.parts benchmarks/results/recovery.csv --data DATA --models DATA \
        --budget 2 --tasks reviews questions --changes "random directions" "moments kept"
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from peft import LoraConfig
from rich.console import Console

from benchmarks.harness.records import RecordFiles
from dynlora import adjuster, schedule
from dynlora.adapters import optimizer_state, resize
from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.adapters.resize import new_rows
from dynlora.adapters.strengths import squared_strengths
from dynlora.adjuster import LayerBounds, bound_layers
from dynlora.features import effective_rank
from dynlora.runs.reader import read_run
from dynlora.train.config_file import make_job
from dynlora.train.job import run_job
from dynlora.train.methods import adapter
from dynlora.types import RankPlan

INTERVALS: dict[str, Callable[[Sequence[int], int], int]] = {
    "every second block observed": lambda _events, _step: 2,
    "every fourth block observed": lambda _events, _step: 4,
    "every fourth block observed after the first event": (
        lambda events, step: 1 if step < events[0] else 4
    ),
}
"""Replacements of `schedule._blocks_apart`."""
CHANGES = {
    "random directions": "grown directions are random instead of directions of the input",
    "moments kept": "events do not shorten the memory of the optimizer",
    "pace kept": "an event divides a layer's scale by its rank, as in `lora_alpha / r`, and keeps "
    "its output, so that it learns equally fast at any rank",
    "pace kept where ranks fall": "the same for layers below the configured rank only",
    "at most 4 r": "no layer exceeds four times the configured rank",
    "at most 3 times what is learned": "no layer exceeds three times the effective rank of its "
    "learned update, or twice the configured rank if that is larger",
    **dict.fromkeys(INTERVALS, "fewer blocks of eight observed steps"),
    "pattern from the start": "plain LoRA with the final ranks of the run",
    "pattern of another seed": "plain LoRA with the final ranks of the next seed's run",
}


def main() -> None:
    """Do the runs that are missing in the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="folder that {models} stood for")
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=[*CHANGES])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    for task in options.tasks:
        records = _records(options.records, task, options.budget, "dynamic")
        plain = _records(options.records, task, options.budget, "lora")
        file = options.out / f"parts-{task}-r{options.budget}.json"
        cell: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        for seed in range(options.seeds):
            cell.setdefault("dynamic", {})[str(seed)] = records[seed]["validation"]["loss"]
            cell.setdefault("lora", {})[str(seed)] = plain[seed]["validation"]["loss"]
            for change in options.changes:
                if str(seed) in cell.setdefault(change, {}):
                    continue
                other = records[(seed + 1) % options.seeds]
                places = {"{data}": options.data, "{models}": options.models}
                loss = _again(records[seed], other, change, places)
                cell[change][str(seed)] = loss
                print(f"{task} seed {seed} {change}: {loss:.4f}", flush=True)
                file.write_text(json.dumps(cell, indent=1) + "\n")


def _records(table: Path, task: str, budget: int, method: str) -> dict[int, dict[str, Any]]:
    """Return the final records of a method by seed."""
    found = RecordFiles(table.parent, table.stem).read()
    wanted = {
        "kind": "final",
        "task": task,
        "budget": budget,
        "method": method,
        "status": "completed",
    }
    return {r["seed"]: r for r in found if wanted.items() <= r.items()}


def _again(
    record: Mapping[str, Any], other: Mapping[str, Any], change: str, places: Mapping[str, Path]
) -> float:
    """Return the validation loss of a recorded run, repeated with one change."""
    with TemporaryDirectory() as folder:
        text = json.dumps(record["config"])
        for name, place in places.items():
            text = text.replace(name, str(place))
        values: dict[str, Any] = json.loads(text) | {"output": f"{folder}/run"}
        with _changed(change, values, record["final_ranks"], other["final_ranks"]):
            run_job(make_job(values), Console(quiet=True))
        return float(read_run(Path(folder) / "run").after["loss"])


@contextmanager
def _changed(
    change: str, values: dict[str, Any], own: Mapping[str, int], other: Mapping[str, int]
) -> Iterator[None]:
    """Remove a part of the method, or set a rank pattern for plain LoRA."""
    apply_plan = LoraAdapters.apply

    def random_rows(layers: Any, counts: Any, tokens: Any, **given: Any) -> Any:
        return new_rows(layers, counts, [None] * len(tokens), **given)

    def apply_at_pace(self: LoraAdapters, plan: RankPlan, *given: Any, **named: Any) -> Any:
        lost = apply_plan(self, plan, *given, **named)
        weights = {n: self.configured_rank / layer.r for n, layer in self.layers.items()}
        least = 1.0 if change == "pace kept where ranks fall" else 0.0
        self.apply_weights({name: max(weight, least) for name, weight in weights.items()})
        return lost

    def patterned(**settings: Any) -> LoraConfig:
        ranks = own if change == "pattern from the start" else other
        scale = settings["lora_alpha"] / settings["r"]
        alphas = {name: scale * rank for name, rank in ranks.items()}
        return LoraConfig(**settings, rank_pattern=dict(ranks), alpha_pattern=alphas)

    def bounded_by_use(layers: Any, *given: Any, **named: Any) -> dict[str, LayerBounds]:
        bounds = bound_layers(layers, *given, **named)
        found = squared_strengths(layers, [None] * len(layers))
        for layer, squares in zip(layers, found, strict=True):
            known = bounds[layer.name]
            learned = effective_rank(squares, floor=0.0)
            most = max(2 * values["lora"]["r"], round(3 * learned))
            ceiling = max(known.floor, min(known.ceiling, most))
            bounds[layer.name] = replace(known, ceiling=ceiling)
        return bounds

    match change:
        case "random directions":
            with patch.object(resize, "new_rows", random_rows):
                yield
        case "moments kept":
            with patch.object(optimizer_state, "MEMORY", 1_000_000):
                yield
        case "pace kept" | "pace kept where ranks fall":
            with patch.object(LoraAdapters, "apply", apply_at_pace):
                yield
        case "at most 4 r":
            values["dynamic"]["max_rank"] = 4 * values["lora"]["r"]
            yield
        case "at most 3 times what is learned":
            with patch.object(adjuster, "bound_layers", bounded_by_use):
                yield
        case _ if change in INTERVALS:
            with patch.object(schedule, "_blocks_apart", INTERVALS[change]):
                yield
        case _:
            values["method"] = "lora"
            with patch.object(adapter, "LoraConfig", patterned):
                yield


if __name__ == "__main__":
    main()
