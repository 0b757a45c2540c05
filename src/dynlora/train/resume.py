"""Resuming: which checkpoint, whether it is complete, and whether it is of this very run.

A checkpoint of a job lies in its run's folder and holds, beside the Trainer's files, `job.json`.
That is written last, so a checkpoint without it was cut short.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dynlora.errors import ResumeError
from dynlora.train.config import JobConfig
from dynlora.train.run_folder import RunFolder, write_json

PROGRESS = "job.json"
MAY_DIFFER = {"output", "overwrite", "training.resume", "training.report_to"}
"""Keys that may differ between a run and the job that resumes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """What a resumed run brings along."""

    checkpoint: Path
    source: RunFolder
    """The folder of the run that the checkpoint belongs to."""
    step: int
    """Optimizer steps taken."""
    train_seconds: float
    """Time in these steps."""
    eval_seconds: float
    """Time in evaluations so far."""
    run: Mapping[str, Any]
    """What its `run.json` says; empty if that is lost."""


def save_progress(checkpoint: Path, *, step: int, train: float, evaluation: float) -> None:
    """Complete a checkpoint with what the Trainer does not keep.

    Args:
        checkpoint: Its folder.
        step: Optimizer steps taken.
        train: Seconds in these steps.
        evaluation: Seconds in evaluations.
    """
    seconds = {"training_steps": train, "evaluation": evaluation}
    write_json(checkpoint / PROGRESS, {"step": step, "seconds": seconds})


def find_past(config: JobConfig, folder: RunFolder) -> Past | None:
    """Return where the job goes on from; None where it starts afresh.

    Raises:
        ResumeError: If there is no such checkpoint, or it is not complete or of another run.
        RunFolderError: If `folder` holds another run that is not to be replaced, or cannot be used.
    """
    folder.check_usable()
    resume = config.training.resume
    if resume == "none":
        if not config.overwrite:
            folder.refuse_run()
        return None
    checkpoint = _latest(folder) if resume == "latest" else Path(resume)
    past = _read(checkpoint)
    _check_same_config(past, config)
    if past.source.root.resolve() != folder.root.resolve() and not config.overwrite:
        folder.refuse_run()
    return past


def check_same_task(past: Past, now: Mapping[str, Any]) -> None:
    """Refuse to go on with another model or other data behind the same configuration.

    Args:
        past: The run to go on with.
        now: Values that its `run.json` must hold too.

    Raises:
        ResumeError: If one differs.
    """
    for key, value in now.items():
        if past.run.get(key, value) != value:
            raise ResumeError(
                f"a resumed run must have the model and data of its checkpoint {past.checkpoint}, "
                f"but `{key}` of {past.source.run} is {past.run[key]} and now {value}: restore "
                "the model and data it began with, or start a new run."
            )


def complete_checkpoints(folder: RunFolder) -> dict[int, Path]:
    """Return the checkpoints to resume from, by their optimizer steps."""
    found = [path.parent for path in folder.checkpoints.glob(f"checkpoint-*/{PROGRESS}")]
    return {int(path.name.removeprefix("checkpoint-")): path for path in found}


def _latest(folder: RunFolder) -> Path:
    found = complete_checkpoints(folder)
    if not found:
        raise ResumeError(
            f"`training.resume: latest` needs a checkpoint in {folder.checkpoints}, got none: "
            "leave `training.resume: none` to start afresh."
        )
    return found[max(found)]


def _read(checkpoint: Path) -> Past:
    if not (checkpoint / "trainer_state.json").is_file():
        raise ResumeError(
            "`training.resume` must be none, latest or the folder of a checkpoint, got "
            f"{checkpoint}, which has no trainer_state.json."
        )
    try:
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"a checkpoint must be complete, got {checkpoint} without a readable {PROGRESS}, which "
            "is written last: resume from an earlier one."
        ) from error
    source = RunFolder(checkpoint.resolve().parent.parent)
    return Past(
        checkpoint=checkpoint,
        source=source,
        step=progress["step"],
        train_seconds=progress["seconds"]["training_steps"],
        eval_seconds=progress["seconds"]["evaluation"],
        run=_read_run(source),
    )


def _read_run(source: RunFolder) -> dict[str, Any]:
    if not source.run.is_file():
        return {}
    values: dict[str, Any] = json.loads(source.run.read_text(encoding="utf-8"))
    return values


def _check_same_config(past: Past, config: JobConfig) -> None:
    path = past.source.config
    if not path.is_file():
        raise ResumeError(
            f"a checkpoint must lie in the folder of its run, got {past.checkpoint}: {path} is "
            "missing."
        )
    then = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    now = flatten(json.loads(json.dumps(asdict(config))))
    differing = [
        f"{key} (was {then.get(key)}, now {now.get(key)})"
        for key in sorted((then.keys() | now.keys()) - MAY_DIFFER)
        if then.get(key) != now.get(key)
    ]
    if differing:
        keys = "1 key differs" if len(differing) == 1 else f"{len(differing)} keys differ"
        raise ResumeError(
            f"a resumed run must have the configuration of its checkpoint {past.checkpoint}, but "
            f"{keys}: {', '.join(differing)}. Use {path} as CONFIG."
        )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        flat.update(nested if nested is not None else {f"{prefix}{key}": value})
    return flat
