"""`dynlora.json` and `dynlora.safetensors` of a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynlora.errors import ResumeError
from dynlora.integrations.checkpoint import load_state, save_state

VALUES: dict[str, Any] = {
    "config": {}, "budget": 10, "budget_left": 8, "max_rank": 4, "step": 3, "frozen": False,
    "timetable": {"events": [3], "late_events": [], "searches": [], "enough": 1},
    "search": {"start_loss": None, "lost": 0.0},
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


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    (tmp_path / "dynlora.json").write_text(json.dumps(VALUES | {"format": 2, "dynlora": "9.8"}))
    told = r"dynlora\.json was written by dynlora 9\.8, format 2; this version reads up to 1"
    with pytest.raises(ResumeError, match=told):
        load_state(tmp_path)
