"""`run.json`."""

import ast
import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from dynlora.runs.record import RunRecord, machine, peak_memory, versions
from dynlora.runs.release import release
from tests.processes import run_in_group


def test_each_update_is_on_disk_at_once_beside_what_was_known(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run.json")
    for status in ("running", "finished"):
        record.update(status=status, **({"seed": 3} if status == "running" else {}))
        values = json.loads((tmp_path / "run.json").read_text())
        assert datetime.fromisoformat(values.pop("written")).tzinfo is UTC
        assert values == {"status": status, "seed": 3}


def test_versions_are_those_of_the_installed_packages() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["dynlora"] == release()
    assert found["peft"] == version("peft")
    assert found["torch"] == version("torch")


def test_the_machine_is_described() -> None:
    found = machine()
    assert set(found) == {"platform", "cpus", "threads", "gpu"}
    assert int(found["cpus"]) >= 1
    assert int(found["threads"]) >= 1


def test_peak_memory_is_in_bytes_and_never_falls() -> None:
    before = peak_memory()["peak_memory_bytes"]
    block = bytearray(50_000_000)
    after = peak_memory()["peak_memory_bytes"]
    assert before is not None
    assert after is not None
    assert len(block) < before <= after < 2**40


def test_the_peak_is_this_processs_own_and_not_of_the_one_that_started_it() -> None:
    ballast = b"x" * 2**30  # so that this process has more than the other will
    script = "from dynlora.runs.record import peak_memory; print(peak_memory())"
    command = [sys.executable, "-W", "ignore", "-c", script]
    told = run_in_group(command, capture_output=True, text=True, check=True).stdout
    peak = ast.literal_eval(told.splitlines()[-1])["peak_memory_bytes"]
    assert 10**7 < peak < len(ballast) < peak_memory()["peak_memory_bytes"]
