"""Runs that did not come to their end: what they have saved, and the command that goes on."""

import shlex
from pathlib import Path

PROGRESS = "job.json"
"""Written last into a checkpoint: one without it was cut short."""


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return what a run has saved, whole or not, by optimizer steps.

    A copy that a user keeps beside it under a longer name is none of the run's.

    Args:
        folder: That of a run's checkpoints.
    """
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints to resume from, by optimizer steps.

    Args:
        folder: That of a run's checkpoints.
    """
    return {s: path for s, path in checkpoints(folder).items() if (path / PROGRESS).is_file()}


def can_resume(root: Path, method: str) -> bool:
    """Return whether a run can go on from a checkpoint.

    Args:
        root: The run's folder.
        method: The run's; `adalora` cannot load its own checkpoints.
    """
    return method != "adalora" and bool(complete_checkpoints(root / "checkpoints"))


def finish_command(root: Path, method: str) -> str:
    """Return the command that brings a run to its end: from its last checkpoint, or afresh.

    It names the folder, for what the configuration in it calls `output` may be another by now.

    Args:
        root: The run's folder.
        method: The run's.
    """
    how = "--training.resume latest" if can_resume(root, method) else "--overwrite true"
    config, output = (shlex.quote(str(path)) for path in (root / "config.yaml", root))
    return f"dynlora train {config} --output {output} {how}"
