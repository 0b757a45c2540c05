"""Records of invented runs."""

import itertools
import random
from pathlib import Path

from benchmarks.harness.records import RecordFiles

RUN = {
    "study": "first", "kind": "final", "key": "0123456789ab", "model": "minilm", "task": "mrpc",
    "method": "lora", "budget": 8, "seed": 0, "status": "completed", "error": None,
    "diverged": False, "config": {}, "tuned": {"learning_rate": 3e-4, "scale": 2.0},
    "main_metric": "accuracy", "validation": {"loss": 0.5, "accuracy": 0.75}, "test": None,
    "collapsed": False, "majority": 0.68,
    "parameters": {"start": 73_728, "peak": 73_728, "end": 73_728}, "peak_memory_bytes": None,
    "initial_ranks": {}, "final_ranks": {}, "steps": 100, "versions": {}, "machine": {},
}  # fmt: skip
KINDS = ("attention.self.query", "attention.self.value", "intermediate.dense", "output.dense")


def values(loss: float | None = None, accuracy: float | None = None, **changes: object) -> dict:
    """Return the values of a record; `loss` and `accuracy` are those on validation data."""
    made = {**RUN, **changes}
    if loss is not None or accuracy is not None:
        made["validation"] = {"loss": loss, "accuracy": 0.75 if accuracy is None else accuracy}
    return made


def write(folder: Path, *records: dict) -> Path:
    """Write the tables of a study into a folder of results; the number of a record is its key."""
    folder.mkdir(parents=True, exist_ok=True)
    keyed = [record | {"key": f"{number:04}"} for number, record in enumerate(records)]
    RecordFiles(folder, records[0]["study"]).replace(keyed)
    return folder


def layers(blocks: int) -> list[str]:
    """Return names of the layers of a small BERT."""
    return [f"encoder.layer.{block}.{kind}" for block in range(blocks) for kind in KINDS]


def invented_study(
    name: str = "first",
    methods: tuple[str, ...] = ("lora", "dynamic", "random"),
    tasks: tuple[str, ...] = ("mrpc",),
    budgets: tuple[int, ...] = (2, 8),
    seeds: int = 6,
    blocks: int = 6,
) -> list[dict]:
    """Return records of a study: `dynamic` is better everywhere, each other a bit different."""
    draws, made, names = random.Random(0), [], layers(blocks)
    for task, budget in itertools.product(tasks, budgets):
        shared = [draws.gauss(0.0, 0.01) for _ in range(seeds)]
        for method, seed in itertools.product(methods, range(seeds)):
            gain = 0.02 if method == "dynamic" else 0.0
            loss = 0.55 - 0.02 * budget**0.5 - gain + shared[seed] + draws.gauss(0.0, 0.004)
            steps = (1,) if method == "lora" else (0.5, 1, 1, 1.5, 2.5)
            made.append(
                values(
                    study=name, task=task, method=method, budget=budget, seed=seed, loss=loss,
                    accuracy=1.2 - loss + draws.gauss(0.0, 0.01),
                    test={"loss": loss + 0.01, "accuracy": 1.18 - loss},
                    final_ranks={n: max(1, round(budget * draws.choice(steps))) for n in names},
                    parameters=dict.fromkeys(("start", "peak", "end"), 9_216 * budget),
                )
            )  # fmt: skip
    return made
