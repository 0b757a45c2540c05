"""The two launches of two processes that most tests look at."""

from pathlib import Path

import pytest

from tests.distributed.launch import end_in_processes, run_in_processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all that two processes found, once the first two lost one of them."""
    out = tmp_path_factory.mktemp("processes")
    lost = end_in_processes("tests.distributed.worker", "lost", out)
    assert lost.returncode != 0
    assert "SIGKILL" in lost.stderr, lost.stderr[-4000:]
    assert not list(out.glob("*.pt"))
    run_in_processes("tests.distributed.worker", "all", out)
    return out
