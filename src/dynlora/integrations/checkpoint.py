"""The controller's state on disk: `dynlora.json` and `dynlora.safetensors` in a checkpoint folder.

Both are plain data: loading them can run no code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dynlora.errors import ResumeError
from dynlora.files.whole import whole_file

_VALUES = "dynlora.json"
_TENSORS = "dynlora.safetensors"
_TENSOR_GROUPS = ("importance", "features", "input_adaptive")


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `DynamicLora.state_dict()` into a checkpoint folder, the values last and atomically."""
    tensors = {
        f"{group}/{key}": tensor.contiguous()
        for group in _TENSOR_GROUPS
        for key, tensor in state[group].items()
    }
    values = {key: value for key, value in state.items() if key not in _TENSOR_GROUPS}
    with whole_file(folder / _TENSORS) as draft:
        save_file(tensors, draft)
    with whole_file(folder / _VALUES) as draft:
        draft.write_text(json.dumps(values, indent=1))


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ResumeError: If a file is missing or cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((folder / _VALUES).read_text())
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ResumeError(
            f"A checkpoint must hold {_VALUES} and {_TENSORS} to resume dynamic ranks, but in "
            f"{folder} {error}. Resume from another checkpoint."
        ) from error
    for group in _TENSOR_GROUPS:
        prefix = f"{group}/"
        state[group] = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
    return state
