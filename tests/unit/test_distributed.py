"""Names on which processes agree, with the other process played by the test."""

import pytest
import torch

from dynlora import distributed
from dynlora.distributed import names_on_all

NAMES = ["a", "b", "c", "d"]


def test_a_name_counts_only_where_every_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def summed(values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor([name in {"b", "c"} for name in NAMES]).to(values)

    cpu = torch.device("cpu")
    assert names_on_all({"a", "c"}, NAMES, cpu) == {"a", "c"}
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", summed)
    assert names_on_all({"a", "c"}, NAMES, cpu) == {"c"}
    assert names_on_all(set(), NAMES, cpu) == set()
