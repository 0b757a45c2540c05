"""A few real steps of a job in a process of its own: what they take, which a plan only predicts."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dynlora.errors import ConfigError

STEPS = 4
"""Optimizer steps that are measured; with `training.group_by_length` the longest batch is first."""
SHORT = (
    "--overwrite=false",
    "--training.eval=no",
    "--training.save=no",
    "--training.load_best_model_at_end=false",
    "--training.early_stopping_patience=null",
    "--training.report_to=[]",
    "--training.resume=none",
)
"""What makes a job one of a few steps that leaves nothing behind."""


def measure_run(arguments: Sequence[str], steps: int) -> dict[str, Any]:
    """Train for a few steps and return what `run.json` says of them.

    Args:
        arguments: CONFIG and options of the job.
        steps: Optimizer steps of the whole run.

    Returns:
        `steps`, `peak_memory_bytes`, `peak_gpu_memory_bytes` and `seconds_a_step`.

    Raises:
        ConfigError: If the process does not come to its end.
    """
    count = min(STEPS, steps)
    with TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        own = [f"--output={output}", f"--training.max_steps={count}", *SHORT, "--quiet"]
        command = [sys.executable, "-m", "dynlora.cli.main", "train", *arguments, *own]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(_why(done.returncode, done.stderr))
        facts = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {
        "steps": count,
        "peak_memory_bytes": facts["peak_memory_bytes"],
        "peak_gpu_memory_bytes": facts["peak_gpu_memory_bytes"],
        "seconds_a_step": round(facts["seconds"]["training_steps"] / count, 3),
    }


def _why(code: int, said: str) -> str:
    """Return what became of the process."""
    if code < 0:
        return (
            f"--measure must be able to train for a few steps, but the process was ended by signal "
            f"{-code}: most likely memory ran out; lower `training.batch_size`."
        )
    last = said.strip().splitlines()[-1] if said.strip() else f"exit code {code}"
    return f"--measure must be able to train for a few steps: {last.removeprefix('error: ')}"
