"""`dynlora.json` and `dynlora.safetensors` of a checkpoint: formats of all versions."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dynlora.errors import ResumeError
from dynlora.integrations.checkpoint import load_state, save_state

VALUES: dict[str, Any] = {
    "config": {}, "budget": 10, "max_rank": 4, "step": 3, "frozen": False, "events": [3],
    "layers": {"a": {"r": 2, "scaling": 2.0, "unit": 1.0}}, "history": [], "skipped": {},
    "unreached": [], "seconds": 0.5, "peak_parameters": 10,
}  # fmt: skip
STATE = VALUES | {
    "importance": {"a/mean": torch.ones(2)},
    "features": {},
    "extensions": {"input_adaptive/thresholds": torch.zeros(1)},
}


def test_a_state_is_read_as_it_was_saved(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    found = load_state(tmp_path)
    assert found.keys() == STATE.keys()
    assert {key: found[key] for key in VALUES} == VALUES
    assert torch.equal(found["importance"]["a/mean"], torch.ones(2))
    assert list(found["extensions"]) == ["input_adaptive/thresholds"]


def test_the_first_format_without_a_number_is_read_and_a_newer_one_is_refused(
    tmp_path: Path,
) -> None:
    tensors, path = tmp_path / "dynlora.safetensors", tmp_path / "dynlora.json"
    save_file({"input_adaptive/thresholds": torch.zeros(1), "features/b": torch.ones(1)}, tensors)
    digest = hashlib.sha256(tensors.read_bytes() + json.dumps(VALUES, sort_keys=True).encode())
    path.write_text(json.dumps(VALUES | {"sha256": digest.hexdigest()}))
    found = load_state(tmp_path)
    assert {key: found[key] for key in VALUES} == VALUES
    assert list(found["extensions"]) == ["input_adaptive/thresholds"]
    assert list(found["features"]) == ["b"]
    path.write_text(json.dumps(VALUES | {"format": 3, "dynlora": "9.8"}))
    told = r"dynlora\.json was written by dynlora 9\.8, format 3; this version reads up to 2"
    with pytest.raises(ResumeError, match=told):
        load_state(tmp_path)
