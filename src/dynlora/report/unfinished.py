"""Runs that did not come to their end: what they have saved, and the command that goes on."""

import shlex
from pathlib import Path

PROGRESS = "job.json"
"""Written last into a checkpoint: one without it was cut short."""


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints to resume from, by their optimizer steps.

    Args:
        folder: That of a run's checkpoints.
    """
    found = [path.parent for path in folder.glob(f"checkpoint-*/{PROGRESS}")]
    return {int(path.name.removeprefix("checkpoint-")): path for path in found}


def finish_command(root: Path) -> str:
    """Return the command that brings a run to its end: from its last checkpoint, or afresh.

    Args:
        root: The run's folder.
    """
    saved = complete_checkpoints(root / "checkpoints")
    how = "--training.resume latest" if saved else "--overwrite true"
    return f"dynlora train {shlex.quote(str(root / 'config.yaml'))} {how}"
