"""LoRA and dynamic ranks on MRPC with equal seeds: run folders in, one JSON and one table out.

Each run is a separate `dynlora train`; a finished run is not repeated.

    python benchmarks/mrpc.py --model DIR --data DIR --runs runs/mrpc --out benchmarks/results
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student

EXAMPLE = Path(__file__).parent.parent / "examples" / "mrpc.yaml"
METRICS = ("accuracy", "f1", "loss")


def main() -> None:
    """Do the missing runs, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--data", required=True, help="folder of MRPC's parquet files")
    parser.add_argument("--runs", type=Path, default=Path("runs/mrpc"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=["lora", "dynamic"])
    options, extra = parser.parse_known_args()
    records = {}
    for seed in range(options.seeds):
        for method in options.methods:
            folder = options.runs / f"{method}-{seed}"
            records[method, seed] = _run(folder, method, seed, options, extra)
    result = _summarise(records, options.methods, options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "mrpc.json").write_text(json.dumps(result, indent=1) + "\n")
    print(_table(result))


def _run(
    folder: Path, method: str, seed: int, options: argparse.Namespace, extra: list[str]
) -> dict[str, object]:
    """Return the record of a finished run, training it first if there is none."""
    path = folder / "run.json"
    if not path.is_file() or json.loads(path.read_text())["status"] != "finished":
        command = [
            sys.executable, "-m", "dynlora.cli.main", "train", str(EXAMPLE),
            "--output", str(folder), "--overwrite", "true", "--method", method,
            "--training.seed", str(seed), "--training.save", "no",
            "--model.path", options.model, "--data.path", options.data, *extra,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record: dict[str, object] = json.loads(path.read_text())
    return record


def _summarise(
    records: dict[tuple[str, int], dict[str, object]], methods: list[str], seeds: int
) -> dict[str, object]:
    runs = [
        {
            "method": method,
            "seed": seed,
            "versions": record["versions"],
            "bf16": record["bf16"],
            "metrics_after": record["metrics_after"],
            "parameters": record["parameters"],
            "seconds": record["seconds"],
            "final_ranks": record["final_ranks"],
        }
        for (method, seed), record in records.items()
    ]
    differences = {}
    first, *others = methods
    for other in others:
        for metric in METRICS:
            pairs = [
                records[other, s]["metrics_after"][metric]  # type: ignore[index]
                - records[first, s]["metrics_after"][metric]  # type: ignore[index]
                for s in range(seeds)
            ]
            differences[f"{other} - {first}: {metric}"] = _interval(pairs)
    return {"runs": runs, "paired_differences": differences}


def _interval(values: list[float]) -> dict[str, object]:
    """Return the mean with its 95 % interval by Student's t, one value per seed."""
    half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    centre = mean(values)
    return {"mean": centre, "low": centre - half, "high": centre + half, "each": values}


def _table(result: dict[str, object]) -> str:
    lines = ["| method | seed | accuracy | F1 | loss |", "| --- | --- | --- | --- | --- |"]
    for run in result["runs"]:  # type: ignore[attr-defined]
        after = run["metrics_after"]
        lines.append(
            f"| {run['method']} | {run['seed']} | {after['accuracy']:.4f} | {after['f1']:.4f} "
            f"| {after['loss']:.4f} |"
        )
    for name, value in result["paired_differences"].items():  # type: ignore[attr-defined]
        lines.append(
            f"\n{name}: {value['mean']:+.4f}, 95 % interval [{value['low']:+.4f}, "
            f"{value['high']:+.4f}]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
