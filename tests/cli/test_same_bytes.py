"""A run's files do not depend on the process that trains, beside times and the device's speed."""

import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_write_the_same_adapter(job: Path, output: Path) -> None:
    written = []
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "dynlora", "train", str(job), "--overwrite", "true"]
        given = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([*command, "--quiet"], env=given, check=True)
        files = [path for path in output.rglob("adapter_*") if path.is_file()]
        written.append({path.relative_to(output): path.read_bytes() for path in files})
    assert written[0].keys() == written[1].keys()
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []
    assert Path("adapter/adapter_config.json") in written[0]
