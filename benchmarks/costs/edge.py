"""Smallest memory in which `examples/edge.yaml` trains, on one core.

    python -m benchmarks.costs.edge --model MODEL --data DATA

MODEL is a folder of SmolLM2-135M-Instruct in float32, DATA a folder of E2E NLG. Each run is a
process of its own in a control group (Linux, version 1 or 2, as root) with a limit of memory, on
one core. Two steps each under falling limits, until one is killed; then the whole job under the
smallest of the others, and under larger ones until it ends. The reference has no limit, no 4 bits,
no checkpointing, and batches of eight. Writes `edge.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 2**20
LIMITS = (2048, 1536, 1280, 1024, 896, 768, 640, 512)
"""MiB, the largest first."""
SHORT = ("--training.max_steps=2", "--data.max_validation_rows=8")
PLAIN = (
    "--model.quantization=null", "--training.activation_checkpointing=false",
    "--training.batch_size=8", "--training.gradient_accumulation=1",
)  # fmt: skip
SPARING = {
    "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}  # fmt: skip
"""Settings of glibc and oneDNN that keep less freed memory and fewer generated kernels."""
GROUPS = Path("/sys/fs/cgroup")
FILES = (
    ("memory/dynlora-edge", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    ("dynlora-edge", "memory.max", "memory.peak"),
)
"""Folder of the group, file of its limit and file of its peak, in versions 1 and 2."""


@contextmanager
def group(limit: int | None) -> Iterator[tuple[Path, Path]]:
    """Yield the folder of a new control group and the file of its peak, in bytes."""
    name, limits, peak = FILES[0] if (GROUPS / "memory").is_dir() else FILES[1]
    folder = GROUPS / name
    folder.mkdir()
    try:
        if limit is not None:
            (folder / limits).write_text(str(limit))
        yield folder, folder / peak
    finally:
        while (folder / "cgroup.procs").read_text():  # a killed process takes a moment
            time.sleep(0.1)
        folder.rmdir()


def train(model: Path, data: Path, limit: int | None, options: tuple[str, ...]) -> dict[str, Any]:
    """Train once; return what was measured, or `killed` if memory did not suffice."""
    with group(limit) as (folder, peak), tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        command = [
            sys.executable, "-m", "dynlora", "train", "examples/edge.yaml", "--quiet",
            f"--model.path={model}", "--model.name=null", f"--data.path={data}", f"--output={run}",
            *options,
        ]  # fmt: skip

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

        ended = subprocess.run(command, preexec_fn=enter, env=os.environ | SPARING, check=False)
        found: dict[str, Any] = {"limit_mib": limit and limit // MIB}
        found["peak_mib"] = round(int(peak.read_text()) / MIB)
        if ended.returncode:
            return found | {"killed": ended.returncode}
        facts = json.loads((run / "run.json").read_text())
        seconds = facts["seconds"]["training_steps"] / facts["steps"]
        loss = facts["metrics_after"]["loss"]
        return found | {"seconds_per_step": round(seconds, 2), "loss": loss}


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/edge.json"))
    options = parser.parse_args()
    found: dict[str, Any] = {"short": []}

    def measure(limit: int | None, given: tuple[str, ...]) -> dict[str, Any]:
        made = train(options.model, options.data, limit, given)
        print(json.dumps(made), flush=True)
        return made

    enough: list[int | None] = []
    for limit in (None, *(MIB * mib for mib in LIMITS)):
        found["short"].append(measure(limit, SHORT))
        if "killed" in found["short"][-1]:
            break
        enough.append(limit)
    found["edge"] = []
    while enough and ("killed" in found["edge"][-1] if found["edge"] else True):
        found["edge"].append(measure(enough.pop(), ()))
    found["reference"] = measure(None, PLAIN)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
