"""What processes agree on, with the other process played by the test."""

import pytest
import torch

from dynlora import distributed
from dynlora.distributed import names_on_all

NAMES = ["a", "b", "c", "d"]
CPU = torch.device("cpu")


def test_one_process_has_its_own_names() -> None:
    assert names_on_all({"a", "c"}, NAMES, CPU) == {"a", "c"}


def test_a_name_counts_only_where_every_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduced(values: torch.Tensor) -> torch.Tensor:
        others = torch.tensor([name not in {"b", "c"} for name in NAMES]).to(values)
        return torch.maximum(values, others)

    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "max_over_processes", reduced)
    assert names_on_all({"a", "c"}, NAMES, CPU) == {"c"}
    assert names_on_all(set(), NAMES, CPU) == set()
