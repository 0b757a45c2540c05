"""Explain why training ended early: files of a checkpoint, a full disk, or the user's signal."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from safetensors import SafetensorError

from dynlora.errors import ResumeError, RunFolderError
from dynlora.runs.checkpoints import SEAL, can_resume, complete_checkpoints, finish_command
from dynlora.train.build import Job

_REFUSED = ("iostream", "PytorchStreamWriter", "inline_container")
"""Words in torch's error messages for a full disk."""


@contextmanager
def explaining_files(job: Job) -> Iterator[None]:
    """Translate errors of torch and safetensors about checkpoints."""
    try:
        yield
    except UnpicklingError as error:
        raise _unreadable(job, error) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        checkpoint = job.folder.checkpoints / f"checkpoint-{job.trainer.state.global_step}"
        half_written = checkpoint.is_dir() and not (checkpoint / SEAL).exists()
        of_torch = type(error) is RuntimeError
        if not half_written and isinstance(error, SafetensorError):
            raise _unreadable(job, error) from error
        if not half_written or (of_torch and not any(sign in str(error) for sign in _REFUSED)):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)  # frees disk space for `run.json`
        root, method = job.folder.root, job.config.method
        raise RunFolderError(
            f"a checkpoint must be written whole, but in {checkpoint} the disk refused "
            f"({error}): make room, then {'go on' if can_resume(root, method) else 'start again'} "
            f"with `{finish_command(root, method)}`."
        ) from error


def _unreadable(job: Job, error: Exception) -> ResumeError:
    """Return the error for a file with a correct checksum that torch or safetensors cannot read."""
    place = None if job.past is None else job.past.checkpoint
    reason = str(error).splitlines()[0]
    return ResumeError(
        f"the files of a checkpoint must be weights and plain values, got {place}, in which one "
        f"cannot be read as such ({reason}): resume from another one, or start again."
    )


def how_to_continue(job: Job) -> str:
    """Return the progress of an interrupted run, and the command to continue it."""
    folder, state, method = job.folder, job.trainer.state, job.config.method
    command = finish_command(folder.root, method)
    done = f"after {state.global_step} of {state.max_steps} steps"
    saved = complete_checkpoints(folder.checkpoints)
    if not saved:
        return f"{done}, before the first checkpoint; start again: {command}"
    if method == "adalora":
        return f"{done}; AdaLoRA cannot go on from a checkpoint; start again: {command}"
    return f"{done}; go on from step {max(saved)}: {command}"
