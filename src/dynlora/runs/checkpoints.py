"""Checkpoints of unfinished runs, and the command that finishes such a run."""

import shlex
from pathlib import Path

PROGRESS = "job.json"
"""Last file written into a checkpoint; without it the checkpoint is incomplete."""


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return a run's checkpoints, complete or not, by optimizer step.

    Folders with longer names, such as a user's copies, are ignored.

    Args:
        folder: Folder of the run's checkpoints.
    """
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints by optimizer step.

    Args:
        folder: Folder of the run's checkpoints.
    """
    return {s: path for s, path in checkpoints(folder).items() if (path / PROGRESS).is_file()}


def can_resume(root: Path, method: str) -> bool:
    """Return whether a run can resume from a checkpoint.

    Args:
        root: Folder of the run.
        method: Method of the run; `adalora` cannot load its checkpoints.
    """
    return method != "adalora" and bool(complete_checkpoints(root / "checkpoints"))


def finish_command(root: Path, method: str) -> str:
    """Return the command that resumes a run from its last checkpoint, or else restarts it.

    It passes `--output`, because the folder may have moved since its configuration was written.

    Args:
        root: Folder of the run.
        method: Method of the run.
    """
    how = "--training.resume latest" if can_resume(root, method) else "--overwrite true"
    config, output = (shlex.quote(str(path)) for path in (root / "config.yaml", root))
    return f"dynlora train {config} --output {output} {how}"
