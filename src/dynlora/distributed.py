"""What processes that train together must agree on; one alone agrees with itself.

Every function here is a collective: all processes call it, in the same order.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor
from torch import distributed as dist


def process_count() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return the place of this process among them, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the elementwise sum; what every process gets is the same to the last bit."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_processes(values: Tensor) -> Tensor:
    """Return the elementwise maximum."""
    return _reduced(values, dist.ReduceOp.MAX)


def gather_from_processes(values: Tensor) -> Tensor:
    """Return the values of all processes, stacked along a new first axis in their order."""
    if process_count() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(process_count())]
    dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def share_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, which all processes hold in the same shapes, with those of the first."""
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
    """Return the mean of each figure; one that any process lacks is left out everywhere.

    Args:
        figures: This process's, by module name.
        names: All layers, in the same order on every process.
        device: Where the processes exchange tensors.
    """
    if process_count() == 1:
        return dict(figures)
    # Two rows: the figure, and whether there is one.
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


def names_on_all(names: Set[str], possible: Sequence[str], device: torch.device) -> set[str]:
    """Return the names that every process has.

    Args:
        names: This process's.
        possible: All names, in the same order on every process.
        device: Where the processes exchange tensors.
    """
    if process_count() == 1:
        return set(names)
    missing = torch.tensor([name not in names for name in possible], dtype=torch.int64)
    anywhere = max_over_processes(missing.to(device)).tolist()
    return {name for name, lacks in zip(possible, anywhere, strict=True) if not lacks}


def agreed_ranks(ranks: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """Return the ranks that the first process planned.

    Args:
        ranks: This process's plan, by module name, for the same layers in the same order.
        device: Where the processes exchange tensors.
    """
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
