"""Find the checkpoint to resume from, and check that it is whole and of the same run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerState

from dynlora.errors import ResumeError, RunFileError
from dynlora.files.json_files import read_json
from dynlora.files.plain_values import flatten
from dynlora.integrations.checkpoint import VALUES, load_state
from dynlora.runs.checkpoints import checkpoints, complete_checkpoints, unseal
from dynlora.runs.folder import RunFolder
from dynlora.runs.record import read_config, read_record

STATE = "trainer_state.json"
MAY_DIFFER = {"output", "overwrite", "training.resume", "training.report_to"}  # when resuming


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """Checkpoint and history of a resumed run."""

    checkpoint: Path
    source: RunFolder  # folder of the checkpoint's run
    step: int  # completed optimizer steps
    epoch: int  # completed epochs
    train_seconds: float
    eval_seconds: float
    run: Mapping[str, Any]  # values of `run.json`; empty if the file is missing
    log: Sequence[Mapping[str, Any]]  # the Trainer's log up to the checkpoint
    best: Path | None = None  # current path of the best checkpoint so far, if any
    skipped: Sequence[str] = ()  # reasons for skipping later checkpoints

    def is_in(self, folder: RunFolder) -> bool:
        """Return whether the checkpoint is of the run in a folder."""
        return self.source.root == folder.root.resolve()


def find_past(folder: RunFolder, config: Mapping[str, Any]) -> Past | None:
    """Return the checkpoint to resume from, or None for a new run.

    Raises `ResumeError` if the checkpoint is missing, incomplete, damaged or of another run, and
    `RunFolderError` if `folder`, which must be usable, contains another run without `overwrite`.
    """
    training = config["training"]
    if training["resume"] == "none":
        if not config["overwrite"]:
            folder.refuse_run()
        return None
    past = _chosen(folder, training["resume"])
    _check_same_config(past, config)
    if training["load_best_model_at_end"] and past.best and not past.best.is_dir():
        raise ResumeError(
            "a run that ends with its best checkpoint must have it beside the one it goes on from, "
            f"got no {past.best}: restore it, or start again."
        )
    if not past.is_in(folder) and not config["overwrite"]:
        folder.refuse_run()
    return past


def check_same_task(past: Past, now: Mapping[str, Any]) -> None:
    """Raise `ResumeError` if values in the past run's `run.json` differ from those of `now`."""
    for key, value in now.items():
        if past.run.get(key, value) != value:
            raise ResumeError(
                "a resumed run must have the model, data, processes and engine of its checkpoint "
                f"{past.checkpoint}, but `{key}` of {past.source.run} is {past.run[key]} and now "
                f"{value}: restore what it began with, or start a new run."
            )


def _chosen(folder: RunFolder, resume: str) -> Past:
    """Return the checkpoint that `training.resume` names."""
    if resume == "latest-good":
        return _latest_good(folder)
    if resume != "latest":
        return _read(Path(resume))
    found = complete_checkpoints(folder.checkpoints)
    if not found:
        raise ResumeError(
            f"`training.resume: latest` needs a checkpoint in {folder.checkpoints}, got none: "
            "leave `training.resume: none` to start afresh."
        )
    return _read(found[max(found)])


def _latest_good(folder: RunFolder) -> Past:
    """Return the newest intact checkpoint, with the reasons for skipping later ones."""
    found = checkpoints(folder.checkpoints)
    skipped: list[str] = []
    for step in sorted(found, reverse=True):
        try:
            return replace(_read(found[step]), skipped=tuple(skipped))
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
    sealed = unseal(checkpoint)
    state = _trainer_state(checkpoint)
    if (checkpoint / VALUES).exists():
        load_state(checkpoint)
    source = RunFolder(checkpoint.resolve().parent.parent)
    best = state["best_model_checkpoint"]
    return Past(
        checkpoint=checkpoint,
        source=source,
        step=sealed["step"],
        epoch=int(state["epoch"]),
        train_seconds=sealed["seconds"]["training_steps"],
        eval_seconds=sealed["seconds"]["evaluation"],
        run=read_record(source.run) if source.run.is_file() else {},
        log=state["log_history"],
        best=None if best is None else source.checkpoints / Path(best).name,
    )


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the values of `trainer_state.json`, whose keys depend on the transformers version."""
    try:
        state = read_json(checkpoint / STATE)
        TrainerState(**state)
    except (RunFileError, TypeError) as error:
        raise ResumeError(
            f"a checkpoint must hold the {STATE} of its step, got {checkpoint}, in which {error}: "
            "resume from an earlier one, which `training.resume: latest-good` finds, or start "
            "again."
        ) from error
    return state


def _check_same_config(past: Past, config: Mapping[str, Any]) -> None:
    path = past.source.config
    then, now = flatten(read_config(path)), flatten(config)
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
