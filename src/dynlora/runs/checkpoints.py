"""Checkpoints of a run, sealed by `job.json`: written last, with the checksums of all files."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynlora.errors import ResumeError
from dynlora.files.json_files import as_object, check_format, stamp, write_json
from dynlora.files.plain_values import parse_json
from dynlora.files.whole import remove
from dynlora.runs.record import FORMAT, check_kind

SEAL = "job.json"


@dataclass(frozen=True)
class _Seconds:
    training_steps: float
    evaluation: float


_KINDS = {"step": int, "seconds": _Seconds, "files": dict[str, dict[str, Any]]}


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return a run's checkpoints, complete or not, by optimizer step.

    Folders with longer names, such as a user's copies, are ignored.
    """
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return {int(number): path for number, path in found.items() if number.isdecimal()}


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints by optimizer step."""
    return {step: path for step, path in checkpoints(folder).items() if (path / SEAL).is_file()}


def delete_old(folder: Path, limit: int, kept: set[str]) -> None:
    """Delete the oldest checkpoints beyond a limit, except the names in `kept`."""
    saved = checkpoints(folder)
    others = [saved[step] for step in sorted(saved) if saved[step].name not in kept]
    for path in others[: max(0, len(saved) - limit)]:
        remove(path)


def seal(checkpoint: Path, *, step: int, train: float, evaluation: float) -> None:
    """Complete a checkpoint: write step, seconds and the checksums of all files to `job.json`.

    `train` and `evaluation` are the seconds in completed steps and in evaluations.
    """
    (checkpoint / SEAL).unlink(missing_ok=True)  # a manifest must not list an older one
    seconds = {"training_steps": train, "evaluation": evaluation}
    values = {"step": step, "seconds": seconds, "files": manifest_of(checkpoint)}
    write_json(checkpoint / SEAL, stamp(FORMAT) | values)


def unseal(checkpoint: Path) -> dict[str, Any]:
    """Return the values that `seal` wrote, after checking all files of the checkpoint."""
    path = checkpoint / SEAL
    try:
        values = as_object(parse_json(path.read_text(encoding="utf-8")))
        check_format(path, values, FORMAT, ResumeError)
        for key, kind in _KINDS.items():
            check_kind(values.get(key), kind, key)
        if min(values["step"], *values["seconds"].values()) < 0:
            raise ValueError("`step` and `seconds` must be at least 0")
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"a checkpoint must be complete, got {checkpoint} without a readable {SEAL}, which "
            f"is written last ({error}): resume from an earlier one."
        ) from error
    wrong = _damage(checkpoint, values["files"])
    if wrong is not None:
        raise ResumeError(
            f"a checkpoint must be as it was written, got {checkpoint}, in which {wrong}: resume "
            "from an earlier one, which `training.resume: latest-good` finds, or start again."
        )
    return values


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size in bytes and SHA-256 of each file in a folder tree, by relative path."""
    return {
        path.relative_to(folder).as_posix(): _figures(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _damage(folder: Path, manifest: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the fault of the first file that differs from the manifest, if any."""
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        try:
            if _figures(path) != expected:
                return f"{path} has other content than was written"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
    return None


def _figures(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def can_resume(root: Path, method: str) -> bool:
    """Return whether a run can resume; `adalora` cannot load its checkpoints."""
    return method != "adalora" and bool(complete_checkpoints(root / "checkpoints"))


def finish_command(root: Path, method: str, processes: int = 1, engine: str | None = None) -> str:
    """Return the command that resumes a run from its last checkpoint, or else restarts it.

    It passes `--output`, because the folder may have moved since its configuration was written. An
    `engine` that shards the model needs Accelerate's launcher.
    """
    launcher, group = "dynlora", f" --processes {processes}" if processes > 1 else ""
    if engine is not None:
        launcher, group = "accelerate launch --config_file ... -m dynlora", ""
    how = "--training.resume latest" if can_resume(root, method) else "--overwrite true"
    config, output = (shlex.quote(str(path)) for path in (root / "config.yaml", root))
    return f"{launcher} train {config} --output {output} {how}{group}"


def way_on(root: Path, method: str, processes: int, engine: str | None = None) -> str:
    """Return the advice to finish a run after a failure, with its command."""
    if not (root / "config.yaml").is_file():
        return "start again"
    verb = "go on" if can_resume(root, method) else "start again"
    return f"{verb} with `{finish_command(root, method, processes, engine)}`"
