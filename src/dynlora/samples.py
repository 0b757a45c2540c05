"""Input samples: one sample per layer and process in, one joined sample per layer out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora.distributed import (
    gather_from_processes,
    max_over_processes,
    process_count,
    process_rank,
    sum_over_processes,
)
from dynlora.types import UNUSED_KEY, Tokens

SAMPLE_SIZE = 128
"""Tokens kept per layer."""

_DTYPES = (torch.int64, torch.bfloat16, torch.float16, torch.float32)
"""Token dtypes by precision: processes that differ use the latest one."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One layer's input tokens with the smallest keys."""

    keys: Int[Tensor, " n"]
    tokens: Tokens
    """Inputs in their own dtype, at most float32."""
    output_power: Float[Tensor, " n"]
    """Squared norm of the layer's output per token."""


def share_tokens(samples: dict[str, Sample]) -> dict[str, Sample]:
    """Share keys and tokens between consecutive layers if they are equal; return the samples."""
    last: Sample | None = None
    for sample in samples.values():
        if last is not None and torch.equal(sample.keys, last.keys):
            sample.keys = last.keys
            one_type = sample.tokens.dtype == last.tokens.dtype
            if one_type and torch.equal(sample.tokens, last.tokens):
                sample.tokens = last.tokens
        last = sample
    return samples


def joined(
    names: Sequence[str],
    samples: dict[str, Sample],
    stale: set[str],
    *,
    device: torch.device | None,
) -> tuple[dict[str, Sample], set[str]]:
    """Return the joined samples of all processes, and the names of the stale ones.

    The result equals the sample of one process that sees all batches. Processes exchange keys
    first, then only the kept tokens; keys or tokens shared with the layer before are sent once.

    Args:
        names: All layers, in the same order on every process.
        samples: This process's samples by module name.
        stale: Layers whose sample is older than the last event; used if no process has a newer one.
        device: Device of the samples.
    """
    if process_count() == 1:
        return samples, stale
    device = next((sample.keys.device for sample in samples.values()), device)
    own = [samples.get(name) for name in names]
    fresh = [name in samples and name not in stale for name in names]
    agreed = _agree(own, fresh, device)
    counting = [s if f == a else None for s, f, a in zip(own, fresh, agreed.fresh, strict=True)]
    kept, mine, slot = _join_keys(counting, agreed.new_keys, device)
    power = _join_power(counting, mine, slot)
    tokens = _join_tokens(counting, agreed, mine, slot)
    found = {
        name: Sample(keys=kept[place], tokens=tokens[place], output_power=power[place])
        for place, name in enumerate(names)
        if agreed.dtypes[place] >= 0
    }
    return found, {name for name, new in zip(names, agreed.fresh, strict=True) if not new}


def _join_keys(
    own: Sequence[Sample | None], new_keys: Sequence[int], device: torch.device | None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return per layer the smallest keys, a mask of this process's keys, and their local indices.

    Layers with the same keys get the same tensors.
    """
    rows = []
    for sample, new in zip(own, new_keys, strict=True):
        if new:
            row = torch.full((SAMPLE_SIZE,), UNUSED_KEY, device=device)
            if sample is not None:
                row[: len(sample.keys)] = sample.keys
            rows.append(row)
    everyone = gather_from_processes(torch.stack(rows)).transpose(0, 1).flatten(1)
    kept, origin = torch.topk(everyone, SAMPLE_SIZE, dim=1, largest=False)
    mine = (origin // SAMPLE_SIZE == process_rank()) & (kept != UNUSED_KEY)
    slot = torch.where(mine, origin % SAMPLE_SIZE, 0)
    places = [row - 1 for row in accumulate(new_keys)]
    joined_keys, joined_mine, joined_slot = (
        [part[place] for place in places] for part in (kept.unbind(), mine.unbind(), slot.unbind())
    )
    return joined_keys, joined_mine, joined_slot


def _join_power(
    own: Sequence[Sample | None], mine: Sequence[Tensor], slot: Sequence[Tensor]
) -> Tensor:
    """Return the output power of the kept tokens per layer, summed from their processes."""
    power = torch.zeros(len(own), SAMPLE_SIZE, device=mine[0].device)
    for place, sample in enumerate(own):
        if sample is not None:
            power[place, mine[place]] = sample.output_power[slot[place][mine[place]]]
    return sum_over_processes(power)


def _join_tokens(
    own: Sequence[Sample | None], agreed: "_Agreed", mine: Sequence[Tensor], slot: Sequence[Tensor]
) -> list[Tensor]:
    """Return the kept tokens per layer; meaningless for layers that no process has sampled."""
    found: list[Tensor] = []
    for place, sample in enumerate(own):
        if agreed.dtypes[place] < 0 or not agreed.new_tokens[place]:
            found.append(found[-1] if found else torch.empty(0))
            continue
        width, chosen = agreed.widths[place], mine[place]
        shape = (SAMPLE_SIZE, width) if width else (SAMPLE_SIZE,)
        tokens = torch.zeros(shape, dtype=_DTYPES[agreed.dtypes[place]], device=chosen.device)
        if sample is not None:
            tokens[chosen] = sample.tokens.to(tokens.dtype)[slot[place][chosen]]
        found.append(sum_over_processes(tokens))
    return found


@dataclass(frozen=True, slots=True)
class _Agreed:
    """Properties of each layer's samples, equal on all processes."""

    fresh: list[int]
    """Whether any process has a sample since the last event."""
    dtypes: list[int]
    """Index in `_DTYPES`; -1 if no process has a sample."""
    widths: list[int]
    """Width of a token; 0 for ids."""
    new_keys: list[int]
    """Whether the keys differ from the layer before on any process."""
    new_tokens: list[int]
    """Whether the tokens differ from the layer before on any process."""


def _agree(
    own: Sequence[Sample | None], fresh: Sequence[bool], device: torch.device | None
) -> _Agreed:
    table = []
    for place, sample in enumerate(own):
        before = own[place - 1] if place else None
        same_keys = same = False
        if sample is not None and before is not None and fresh[place] == fresh[place - 1]:
            same_keys = sample.keys is before.keys
            same = same_keys and sample.tokens is before.tokens
        table.append([fresh[place], *_format_of(sample), not same_keys, not same])
    known = torch.tensor(table, dtype=torch.int64, device=device).T
    return _Agreed(*max_over_processes(known.contiguous()).tolist())


def _format_of(sample: Sample | None) -> tuple[int, int]:
    """Return the index of the tokens' dtype in `_DTYPES`, and their width; 0 for ids."""
    if sample is None:
        return -1, 0
    width = sample.tokens.shape[1] if sample.tokens.dim() == 2 else 0
    return _DTYPES.index(sample.tokens.dtype), width
