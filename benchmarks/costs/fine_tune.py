"""Time a whole fine-tune: `dynlora train` against a script with the Trainer and PEFT.

    python -m benchmarks.costs.fine_tune mrpc --model DIR --data DIR
    python -m benchmarks.costs.fine_tune e2e_nlg --model DIR --data DIR --rows 2000

Both commands (`examples/TASK.yaml` and `benchmarks/costs/plain_trainer.py`) start in processes of
their own and in turn, read the same rows, use the same settings and precision, and evaluate and
save as often. Seconds are those from the start of a process to its end. With `--rows`, both get
random training and validation rows, a quarter as many of the latter.

Writes `benchmarks/results/fine_tune-TASK.json` for `python -m benchmarks.costs.speed_report`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from dynlora.train.trainer import use_bf16

SIDES = ("plain", "dynlora")


def main() -> None:
    """Time the sides in turn and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("mrpc", "e2e_nlg"))
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the parquet files")
    parser.add_argument("--rows", type=int, help="training rows; otherwise all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        data = _sample(options, Path(folder) / "data")
        for number in range(options.rounds):
            for place in range(len(SIDES)):
                side = SIDES[(number + place) % len(SIDES)]
                command = _command(side, options, data, Path(folder) / f"{side}{number}")
                found[side].append(_timed(command))
                print(side, found[side][-1], flush=True)
    result = {
        "task": options.task, "rows": options.rows, "bf16": use_bf16("auto"),
        "threads": torch.get_num_threads(), **found,
    }  # fmt: skip
    path = options.out / f"fine_tune-{options.task}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


def _sample(options: argparse.Namespace, folder: Path) -> Path:
    """Return the folder of the rows to use."""
    if options.rows is None:
        return Path(options.data).resolve()
    folder.mkdir()
    for split, count in (("train", options.rows), ("validation", options.rows // 4)):
        file = str(options.data / f"{split}.parquet")
        rows = load_dataset("parquet", data_files=file, split="train")
        rows.shuffle(seed=0).select(range(count)).to_parquet(folder / f"{split}.parquet")
    return folder


def _command(side: str, options: argparse.Namespace, data: Path, out: Path) -> list[str]:
    if side == "plain":
        given = ["--model", options.model, "--data", str(data), "--out", str(out)]
        bf16 = ["--bf16"] if use_bf16("auto") else []
        return ["-m", "benchmarks.costs.plain_trainer", options.task, *given, *bf16]
    unset = "name" if options.task == "mrpc" else "package"
    values: dict[str, Any] = {
        "output": out, f"model.{unset}": "null", "model.path": options.model,
        "data.path": data, "data.train_split": "train", "data.validation_split": "validation",
    }  # fmt: skip
    if options.task == "mrpc":
        values |= {"data.name": "null", "data.subset": "null"}
    else:
        values |= {"model.gguf_file": "null"}
    given = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return ["-m", "dynlora", "train", f"examples/{options.task}.yaml", *given, "--json"]


def _timed(command: list[str]) -> dict[str, float]:
    """Return seconds and validation loss of a command that prints the latter last."""
    start = time.perf_counter()
    ran = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    if "dynlora" in command:
        loss = json.loads(ran.stdout)["after"]["loss"]
    else:  # below the Trainer's own lines
        loss = float(ran.stdout.splitlines()[-1])
    return {"seconds": round(seconds, 2), "loss": loss}


if __name__ == "__main__":
    main()
