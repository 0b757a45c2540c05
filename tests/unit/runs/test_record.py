"""`run.json`."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from dynlora.runs.record import RunRecord, release, versions


def test_each_update_is_on_disk_at_once_beside_what_was_known(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run.json")
    for status in ("running", "finished"):
        record.update(status=status, **({"seed": 3} if status == "running" else {}))
        values = json.loads((tmp_path / "run.json").read_text())
        assert datetime.fromisoformat(values.pop("written")).tzinfo is UTC
        assert (values.pop("format"), values.pop("dynlora")) == (1, version("dynlora"))
        assert values == {"status": status, "seed": 3}


def test_versions_are_those_of_the_installed_packages() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["dynlora"] == release()
    assert found["peft"] == version("peft")
    assert found["torch"] == version("torch")
