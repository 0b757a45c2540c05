"""Two processes that would plan differently: the first decides, on ranks and on what grows."""

import torch

from tests.distributed.launch import run_in_processes
from tests.distributed.scenarios import differing


def test_all_processes_take_over_the_plan_and_the_new_directions_of_the_first(tmp_path):
    run_in_processes("tests.distributed.unlike_worker", tmp_path)
    first, second = (torch.load(tmp_path / f"found-{place}.pt") for place in (0, 1))
    assert len(set(first["ranks"].values())) > 1  # the second would have left them equal
    assert second["ranks"] == first["ranks"]
    assert differing(second["weights"], first["weights"]) == []
