"""Find the checkpoint to resume from, and check that it is complete, intact and of the same run.

A checkpoint contains the Trainer's files and `job.json`, written last with checksums of all other
files. Without `job.json` a checkpoint is incomplete; if the checksums differ, it is damaged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerState

from dynlora.errors import ResumeError, RunFileError
from dynlora.files.json_files import as_object, read_json, write_json
from dynlora.files.kinds import Kind, check_kind
from dynlora.files.manifest import damage, manifest_of
from dynlora.files.plain_values import parse_json
from dynlora.integrations.checkpoint import VALUES, load_state
from dynlora.runs.checkpoints import PROGRESS, checkpoints
from dynlora.runs.checkpoints import complete_checkpoints as checkpoints_in
from dynlora.runs.folder import RunFolder
from dynlora.runs.values import read_yaml
from dynlora.train.config import JobConfig
from dynlora.train.config_file import flatten, plain_values

STATE = "trainer_state.json"
_SECONDS = ("training_steps", "evaluation")


@dataclass(frozen=True)
class _Figures:
    """Size and checksum of a file in a checkpoint's manifest."""

    bytes: int
    sha256: str


_PROGRESS_KINDS: Mapping[str, Kind] = {
    "step": int,
    "seconds": dict.fromkeys(_SECONDS, float),
    "files": dict[str, _Figures],
}
_STATE_KINDS: Mapping[str, Kind] = {
    "global_step": int,
    "epoch": float,
    "log_history": list[dict[str, float]],
    "best_metric": float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
    "num_input_tokens_seen": int,
    "total_flos": float,
    "stateful_callbacks": {"TrainerControl": dict[str, Any]},
}
"""Values of `TrainerState` read on a resume."""
_RUN_KINDS: Mapping[str, Kind] = {
    "metrics_before": dict[str, float | None],
    "adapter_start_seconds": float,
}
"""Optional values of `run.json` read on a resume."""
MAY_DIFFER = {"output", "overwrite", "training.resume", "training.report_to"}
"""Keys that may differ between a run and the job that resumes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """Checkpoint and history of a resumed run."""

    checkpoint: Path
    source: RunFolder
    """Folder of the checkpoint's run."""
    step: int
    """Completed optimizer steps."""
    train_seconds: float
    """Seconds in these steps."""
    eval_seconds: float
    """Seconds in evaluations so far."""
    run: Mapping[str, Any]
    """Values of `run.json`; empty if the file is missing."""
    log: Sequence[Mapping[str, Any]]
    """The Trainer's log up to the checkpoint."""
    best: Path | None = None
    """Current path of the best checkpoint so far, if any."""
    skipped: Sequence[str] = ()
    """Reasons for skipping later checkpoints."""


def save_progress(checkpoint: Path, *, step: int, train: float, evaluation: float) -> None:
    """Complete a checkpoint: write step, seconds and checksums of all files to `job.json`.

    Args:
        checkpoint: The checkpoint's folder.
        step: Completed optimizer steps.
        train: Seconds in these steps.
        evaluation: Seconds in evaluations.
    """
    seconds = dict(zip(_SECONDS, (train, evaluation), strict=True))
    (checkpoint / PROGRESS).unlink(missing_ok=True)  # a manifest must not list an older one
    files = manifest_of(checkpoint)
    write_json(checkpoint / PROGRESS, {"step": step, "seconds": seconds, "files": files})


def find_past(config: JobConfig, folder: RunFolder) -> Past | None:
    """Return the checkpoint to resume from, or None for a new run.

    Raises:
        ResumeError: If the checkpoint is missing, incomplete, damaged or of another run.
        RunFolderError: If `folder` cannot be used, or contains another run without `overwrite`.
    """
    folder.check_usable()
    resume = config.training.resume
    if resume == "none":
        if not config.overwrite:
            folder.refuse_run()
        return None
    if resume == "latest-good":
        past = _latest_good(folder)
    else:
        past = _read(_latest(folder) if resume == "latest" else Path(resume))
    _check_same_config(past, config)
    if config.training.load_best_model_at_end and past.best and not past.best.is_dir():
        raise ResumeError(
            "a run that ends with its best checkpoint must have it beside the one it goes on from, "
            f"got no {past.best}: restore it, or start again."
        )
    if past.source.root.resolve() != folder.root.resolve() and not config.overwrite:
        folder.refuse_run()
    return past


def check_same_task(past: Past, now: Mapping[str, Any]) -> None:
    """Check that model and data are the same as when the run began.

    Args:
        past: The run to resume.
        now: Values that must equal those in its `run.json`.

    Raises:
        ResumeError: If a value differs.
    """
    for key, value in now.items():
        if past.run.get(key, value) != value:
            raise ResumeError(
                f"a resumed run must have the model and data of its checkpoint {past.checkpoint}, "
                f"but `{key}` of {past.source.run} is {past.run[key]} and now {value}: restore "
                "the model and data it began with, or start a new run."
            )


def complete_checkpoints(folder: RunFolder) -> dict[int, Path]:
    """Return the complete checkpoints by optimizer step."""
    return checkpoints_in(folder.checkpoints)


def _latest(folder: RunFolder) -> Path:
    found = complete_checkpoints(folder)
    if not found:
        raise ResumeError(
            f"`training.resume: latest` needs a checkpoint in {folder.checkpoints}, got none: "
            "leave `training.resume: none` to start afresh."
        )
    return found[max(found)]


def _latest_good(folder: RunFolder) -> Past:
    """Return the newest intact checkpoint, with the reasons for skipping later ones."""
    found = checkpoints(folder.checkpoints)
    skipped: list[str] = []
    for step in sorted(found, reverse=True):
        try:
            past = _read(found[step])
            if past.source.root != folder.root.resolve():
                raise ResumeError(
                    f"a checkpoint must lie in the folder of its run, got {found[step]}, a link to "
                    f"{found[step].resolve()}."
                )
            return replace(past, skipped=tuple(skipped))
        except (ResumeError, RunFileError) as error:
            skipped.append(str(error))
    raise ResumeError(
        f"`training.resume: latest-good` needs a whole checkpoint in {folder.checkpoints}, got "
        f"{len(found)} of which none is: leave `training.resume: none` to start afresh."
        + "".join(f" {reason}" for reason in skipped[:1])
    )


def _read(checkpoint: Path) -> Past:
    if not (checkpoint / STATE).is_file():
        raise ResumeError(
            "`training.resume` must be none, latest, latest-good or the folder of a checkpoint, "
            f"got {checkpoint}, which has no {STATE}."
        )
    progress = _progress(checkpoint)
    wrong = damage(checkpoint, progress["files"])
    if wrong is not None:
        raise ResumeError(
            f"a checkpoint must be as it was written, got {checkpoint}, in which {wrong}: resume "
            "from an earlier one, which `training.resume: latest-good` finds, or start again."
        )
    state = _trainer_state(checkpoint, progress["step"])
    if (checkpoint / VALUES).exists():
        load_state(checkpoint)
    source = RunFolder(checkpoint.resolve().parent.parent)
    best = state["best_model_checkpoint"]
    return Past(
        checkpoint=checkpoint,
        source=source,
        step=progress["step"],
        train_seconds=progress["seconds"]["training_steps"],
        eval_seconds=progress["seconds"]["evaluation"],
        run=_run_values(source.run) if source.run.is_file() else {},
        log=state["log_history"],
        best=None if best is None else source.checkpoints / Path(best).name,
    )


def _progress(checkpoint: Path) -> dict[str, Any]:
    """Return the values written by `save_progress`.

    Raises:
        ResumeError: If they are missing or invalid.
    """
    try:
        progress = parse_json((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        check_kind(progress, _PROGRESS_KINDS)
        seconds = progress["seconds"].values()
        if progress["step"] < 0 or not all(0 <= value < math.inf for value in seconds):
            raise ValueError("`step` and `seconds` must be finite and at least 0")
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"a checkpoint must be complete, got {checkpoint} without a readable {PROGRESS}, which "
            f"is written last ({error}): resume from an earlier one."
        ) from error
    return as_object(progress)


def _trainer_state(checkpoint: Path, step: int) -> dict[str, Any]:
    """Return the values of `trainer_state.json`.

    Raises:
        ResumeError: If a value is missing, unknown or of the wrong type, or the step differs.
    """
    try:
        state = read_json(checkpoint / STATE)
        check_kind(state, _STATE_KINDS)
        TrainerState(**state)  # refuses unknown keys
        if state["global_step"] != step:
            raise ValueError(f"`global_step` must be {step}, got {state['global_step']}")
    except (RunFileError, ValueError, TypeError) as error:
        raise ResumeError(
            f"a checkpoint must hold the {STATE} of its step, got {checkpoint}, in which {error}: "
            "resume from an earlier one, which `training.resume: latest-good` finds, or start "
            "again."
        ) from error
    return state


def _run_values(path: Path) -> dict[str, Any]:
    """Return the values of `run.json`.

    Raises:
        RunFileError: If the file cannot be read, or a value has the wrong type.
    """
    values = read_json(path)
    try:
        check_kind(values, {key: _RUN_KINDS[key] for key in _RUN_KINDS.keys() & values.keys()})
    except ValueError as error:
        raise RunFileError(
            f"{path} must be as `dynlora train` writes it, but {error}: restore the file from a "
            "copy, or train again."
        ) from error
    return values


def _check_same_config(past: Past, config: JobConfig) -> None:
    path = past.source.config
    if not path.is_file():
        raise ResumeError(
            f"a checkpoint must lie in the folder of its run, got {past.checkpoint}: {path} is "
            "missing."
        )
    then, now = flatten(read_yaml(path)), flatten(plain_values(config))
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
