"""The trace of allocations: every tensor once, freed when it goes, and a straight line in rows."""

import gc

import pytest
import torch
from torch import nn

from dynlora.train.plan.trace import (
    FREED,
    AllocationTrace,
    left_live,
    most_live,
    scale,
    storage_bytes,
)

CPU = torch.device("cpu")


def test_each_tensor_counts_from_its_operation_to_its_end() -> None:
    with AllocationTrace(CPU, []) as trace:
        first = torch.zeros(1000)
        second = first + 1
        view = second[10:]
        view.add_(1)
        del first
        third = second.double()
        del second, view, third
    assert [size for _, size in trace.events] == [4000, 4000, FREED, 8000, FREED, FREED]
    assert most_live(trace.events) == 12000
    assert left_live(trace.events) == 0


def test_what_was_there_before_is_not_counted() -> None:
    weight = nn.Parameter(torch.ones(8, 8))
    with AllocationTrace(CPU, [weight]) as trace:
        weight.detach().mul_(2)
        grown = weight @ weight.T
    assert left_live(trace.events) == grown.numel() * 4


def test_the_backward_pass_is_seen() -> None:
    weight = nn.Parameter(torch.ones(50, 50))
    with AllocationTrace(CPU, [weight]) as trace:
        (weight * 2).sum().backward()
    assert left_live(trace.events) == 50 * 50 * 4, "the gradient alone is left"


def test_the_most_at_once_can_be_asked_from_a_place_on() -> None:
    events = [(1, 100), (1, FREED), (2, 10), (3, 20)]
    assert most_live(events) == 100
    assert most_live(events, 1) == 30
    assert left_live(events) == 30


def run(rows: int) -> AllocationTrace:
    """Train a small network for two steps with Adam on `rows` rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    trace = AllocationTrace(CPU, model.parameters())
    gc.collect()
    with trace:
        for _ in range(2):
            model(torch.ones(rows, 16)).logsumexp(dim=-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    trace.end()
    return trace


def test_two_traces_give_that_of_any_number_of_rows() -> None:
    small, large = run(2), run(3)
    for wanted in (4, 37, 1000):
        scaled = scale(small.events, large.events, rows=2, wanted=wanted)
        assert scaled is not None
        real = run(wanted).events
        assert [size for _, size in scaled] == [size for _, size in real]
        assert most_live(scaled) == most_live(real)


def test_traces_of_other_operations_are_not_compared() -> None:
    assert scale([(1, 4)], [(1, 4), (1, FREED)], rows=2, wanted=5) is None
    assert scale([(1, 4), (1, FREED)], [(1, 4), (2, 4)], rows=2, wanted=5) is None


def test_the_order_in_which_several_are_freed_at_once_does_not_matter() -> None:
    first = [(1, 8), (2, 8), (2, FREED), (1, FREED), (3, 4)]
    second = [(1, 12), (2, 12), (1, FREED), (2, FREED), (3, 4)]
    assert scale(first, second, rows=2, wanted=4) == [
        (1, 16), (2, 16), (1, FREED), (2, FREED), (3, 4),
    ]  # fmt: skip


def test_a_trace_ends_when_it_is_told() -> None:
    with AllocationTrace(CPU, []) as trace:
        kept = torch.zeros(10)
        trace.begin("later")
    trace.end()
    del kept
    gc.collect()
    assert left_live(trace.events) == 40
    assert trace.phases == {"later": 1, "end": 1}


def test_what_is_made_in_a_pause_counts_once_it_is_used() -> None:
    with AllocationTrace(CPU, []) as trace:
        with trace.pause():
            parts = [torch.ones(3), torch.ones(3)]
            made = torch.stack(parts)
            del parts
        assert trace.events == []
        view = made[0]
    assert left_live(trace.events) == 24
    assert view.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_share_memory_count_once(dtype: torch.dtype) -> None:
    whole = torch.zeros(10, 10, dtype=dtype)
    assert storage_bytes([whole, whole[2:], whole.T]) == 100 * dtype.itemsize
