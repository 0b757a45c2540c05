"""Collectives over the training processes: local values in, equal values on every process out.

All processes must call them in the same order, with the same `names` and tensor shapes. `device` is
the device of the exchanged tensors. With one process they return the local values.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor
from torch import distributed as dist


def process_count() -> int:
    """Return the number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def wait_for_processes() -> None:
    """Wait until all processes have called this function; their group needs a backend for CPUs."""
    sum_over_processes(torch.zeros(()))


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the elementwise sum, bitwise equal on all processes."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_processes(values: Tensor) -> Tensor:
    """Return the elementwise maximum."""
    return _reduced(values, dist.ReduceOp.MAX)


def gather_from_processes(values: Tensor) -> Tensor:
    """Return the values of all processes, stacked along a new first axis in rank order."""
    if process_count() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(process_count())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def share_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with the first process's values."""
    if process_count() == 1:
        return
    for tensor in tensors:
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        if whole is not tensor:
            tensor.copy_(whole)


def agreed_figures(
    figures: Mapping[str, float], names: Sequence[str], device: torch.device
) -> dict[str, float]:
    """Return the mean over processes of each figure, of some of the `names`, that all have."""
    if process_count() == 1:
        return dict(figures)
    # Two rows: the figure, and 1 if this process has it.
    own = torch.zeros(2, len(names), dtype=torch.float64)
    for place, name in enumerate(names):
        if name in figures:
            own[:, place] = torch.tensor([figures[name], 1.0], dtype=torch.float64)
    totals, counts = sum_over_processes(own.to(device)).tolist()
    return {
        name: total / process_count()
        for name, total, count in zip(names, totals, counts, strict=True)
        if count == process_count()
    }


def names_on_all(own: Set[str], names: Sequence[str], device: torch.device) -> set[str]:
    """Return the names that all processes have."""
    return set(agreed_figures(dict.fromkeys(own, 1.0), names, device))


def agreed_ranks(ranks: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """Return the ranks planned by the first process, of the same layers in the same order."""
    if process_count() == 1:
        return dict(ranks)
    planned = torch.tensor(list(ranks.values()), device=device)
    share_from_first([planned])
    return dict(zip(ranks, planned.tolist(), strict=True))


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    result = values.clone()
    if process_count() > 1:
        dist.all_reduce(result, operation)
    return result
