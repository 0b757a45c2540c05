"""Share of a damaged model's loss gap that adapters close, from the study `restored`.

    python -m benchmarks.adapters.restored_report --models MODELS

Evaluates the whole and the damaged models without an adapter on the study's test rows, once, into
`restored.json`; reads the records of the study; prints the table.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from peft import LoraConfig, get_peft_model

from benchmarks.harness.records import RecordFiles
from benchmarks.harness.report.statistics import bootstrap_interval
from benchmarks.harness.runner import place
from benchmarks.harness.runs import Jobs, resolve_jobs
from benchmarks.harness.study import read_study
from dynlora.train.config import JobConfig, ModelConfig
from dynlora.train.data.splits import find_split
from dynlora.train.finished_run import FinishedRun, evaluate_run
from dynlora.train.pretrained import locate
from dynlora.train.tasks import TASKS

STUDY = Path("benchmarks/studies/restored.yaml")
WHOLE = "whole"


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of damaged_models")
    options = parser.parse_args()
    jobs = resolve_jobs(read_study(STUDY))
    results = jobs.study.results
    path = results / "restored.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    for name, config in models(jobs, options.models).items():
        if name not in found:
            found[name] = loss_of(config)
            path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, RecordFiles(results, STUDY.stem).read()))


def models(jobs: Jobs, folder: Path) -> dict[str, JobConfig]:
    """Return a job for each model of the study by name, and for the whole model."""
    places = {"models": folder, "data": folder}
    found = {}
    for combination in jobs.combinations():
        config = place(jobs.final(combination, 0, None), places)
        found[combination.model] = config
        found[WHOLE] = replace(config, model=ModelConfig(path=config.model.teacher))
    return found


def loss_of(config: JobConfig) -> float:
    """Return the test loss of a job's model without training, in nats per token.

    It has a new adapter, which changes nothing, because Trainers refuse a quantized model without.
    """
    task, source = TASKS[config.task], locate(config.model)
    processor = task.load_processor(source, config.data)
    base = task.load_model(source, None, processor)
    run = FinishedRun(
        config=config,
        task=task,
        processor=processor,
        model=get_peft_model(base, LoraConfig(target_modules="all-linear")).eval(),
        num_labels=None,
        class_names=None,
    )
    return evaluate_run(run, find_split(config.data, "test")).metrics["loss"]


def table(without: dict[str, float], records: list[dict[str, Any]]) -> str:
    """Return the table: losses, closed shares and paired differences."""
    losses: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    moved: dict[tuple[str, str], int] = defaultdict(int)
    for record in records:
        if record["kind"] == "final":
            cell = record["model"], record["method"]
            losses[cell][record["seed"]] = record["test"]["loss"]
            moved[cell] += bool(record["moved"])
    lines = [
        f"whole model: {without[WHOLE]:.4f}",
        "| model | without | method | seeds | moved | loss | closed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (model, method), by_seed in losses.items():
        gap, loss = without[model] - without[WHOLE], mean(by_seed.values())
        lines.append(
            f"| {model} | {without[model]:.4f} | {method} | {len(by_seed)} "
            f"| {moved[model, method]} | {loss:.4f} | {(without[model] - loss) / gap:.2f} |"
        )
    for model in dict.fromkeys(model for model, _ in losses):
        plain, dynamic = losses[model, "lora"], losses[model, "dynamic"]
        pairs = [100 * (dynamic[s] - plain[s]) / plain[s] for s in plain if s in dynamic]
        if pairs:
            low, high = bootstrap_interval(pairs)
            found = f"{mean(pairs):+.2f} [{low:+.2f}, {high:+.2f}] %"
            lines.append(f"{model}: dynamic less lora: {found}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
