"""A run in two processes that loses one, and is started again with the same command."""

import pytest
import torch

from tests.distributed.launch import end_in_processes, run_in_processes
from tests.distributed.scenarios import differing

WORKER = "tests.distributed.lost_process_worker"
LOST_AT = 9
"""Between two events, and one step after a checkpoint."""


def found_in(folder):
    """Return by rank what each process found."""
    return [torch.load(folder / f"found-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run_in_processes(WORKER, out)
    return found_in(out)


def test_a_run_that_loses_a_process_ends_bit_for_bit_the_same_once_resumed(whole, tmp_path):
    lost = end_in_processes(WORKER, tmp_path, LOST_AT)
    assert lost.returncode != 0
    assert "SIGKILL" in lost.stderr
    assert not (tmp_path / "found-0.pt").exists()
    run_in_processes(WORKER, tmp_path)
    for resumed, expected in zip(found_in(tmp_path), whole, strict=True):
        assert len(set(resumed["ranks"].values())) > 1
        assert resumed["history"] == expected["history"]
        assert differing(resumed["weights"], expected["weights"]) == []
