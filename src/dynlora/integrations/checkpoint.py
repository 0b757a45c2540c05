"""Checkpoints of the controller's state: `dynlora.json` and `dynlora.safetensors` in a folder.

Loading them runs no code. `dynlora.json` ends with a checksum of both files.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dynlora.errors import ResumeError
from dynlora.files.json_files import as_object, check_format, stamp
from dynlora.files.plain_values import parse_json
from dynlora.files.whole import whole_file

VALUES = "dynlora.json"  # marks a checkpoint of dynamic ranks
_TENSORS = "dynlora.safetensors"
_TENSOR_GROUPS = ("importance", "features", "extensions")
_CHECKSUM = "sha256"
_FORMAT = 1  # of both files


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `DynamicLora.state_dict()` into a checkpoint folder, the values last and atomically."""
    tensors = {
        f"{group}/{key}": tensor.contiguous()
        for group in _TENSOR_GROUPS
        for key, tensor in state[group].items()
    }
    plain = {key: value for key, value in state.items() if key not in _TENSOR_GROUPS}
    values = stamp(_FORMAT) | plain
    with whole_file(folder / _TENSORS) as draft:
        save_file(tensors, draft)
    sealed = values | {_CHECKSUM: _checksum(folder, values)}
    with whole_file(folder / VALUES) as draft:
        draft.write_text(json.dumps(sealed, indent=1))


def load_state(folder: Path) -> dict[str, Any]:
    """Return the state that `save_state` wrote; raise `ResumeError` if it is damaged or too new."""
    try:
        state = as_object(parse_json((folder / VALUES).read_text(encoding="utf-8")))
        check_format(folder / VALUES, state, _FORMAT, ResumeError)
        checksum = state.pop(_CHECKSUM, None)
        if checksum != _checksum(folder, state):
            raise ValueError("the files are not as they were written together")
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeError(
            f"A checkpoint must hold whole {VALUES} and {_TENSORS} to resume dynamic ranks, but in "
            f"{folder} {error}. Resume from another checkpoint."
        ) from error
    for mark in stamp(_FORMAT):
        state.pop(mark, None)
    for group in _TENSOR_GROUPS:
        prefix = f"{group}/"
        state[group] = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
    return state


def _checksum(folder: Path, values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the tensors' file followed by the plain values."""
    with (folder / _TENSORS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()
