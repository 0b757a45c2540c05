"""Samples of what enters each layer, and their union over processes that train together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
"""Of tokens; the later ones hold what the earlier ones do."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """The tokens with the smallest keys that one layer has seen."""

    keys: Int[Tensor, " n"]
    tokens: Tokens
    """In the dtype that they entered the layer in, at most float32."""
    output_power: Float[Tensor, " n"]
    """Squared norm of what left the layer, by token."""


def same_tokens(left: Tensor, right: Tensor) -> bool:
    """Return whether two samples are equal, and of one type."""
    return left is right or (left.dtype == right.dtype and torch.equal(left, right))


def share_tokens(samples: dict[str, Sample]) -> dict[str, Sample]:
    """Let layers whose tokens are the same as those of the layer before hold them once."""
    last: Sample | None = None
    for sample in samples.values():
        if last is not None and torch.equal(sample.keys, last.keys):
            sample.keys = last.keys
            if same_tokens(sample.tokens, last.tokens):
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
    """Return samples of the tokens that all processes have seen, and which of them are stale.

    The tokens with the smallest keys of all are those that one process would have kept, had it
    seen all batches. Each process sends keys, and then only those of its tokens that stay; what
    layers have in common, as all of a transformer's do their keys, is sent once.

    Args:
        names: All layers, in the same order on every process.
        samples: What this process holds, by module name.
        stale: Names of samples from before the last event: they count where no process has others.
        device: Where the samples are.
    """
    if process_count() == 1:
        return samples, stale
    device = next((sample.keys.device for sample in samples.values()), device)
    own = [samples.get(name) for name in names]
    fresh = [name in samples and name not in stale for name in names]
    agreed = _agree(own, fresh, device)
    keys, row = [], -1
    rows = [row := row + int(new) for new in agreed.new_keys]
    power = torch.zeros(len(names), SAMPLE_SIZE, device=device)
    for place, sample in enumerate(own):
        if agreed.new_keys[place]:
            keys.append(torch.full((SAMPLE_SIZE,), UNUSED_KEY, device=device))
        if sample is not None and fresh[place] == agreed.fresh[place]:
            keys[-1][: len(sample.keys)] = sample.keys
            power[place, : len(sample.keys)] = sample.output_power
    everyone = gather_from_processes(torch.stack(keys)).transpose(0, 1).flatten(1)
    kept, origin = torch.topk(everyone, SAMPLE_SIZE, dim=1, largest=False)
    mine = (origin // SAMPLE_SIZE == process_rank()) & (kept != UNUSED_KEY)
    slot = torch.where(mine, origin % SAMPLE_SIZE, 0)
    power = sum_over_processes(torch.where(mine[rows], power.gather(1, slot[rows]), 0.0))
    found: dict[str, Sample] = {}
    tokens = torch.empty(0)
    for place, (name, sample) in enumerate(zip(names, own, strict=True)):
        if agreed.dtypes[place] < 0:  # nobody has seen it
            continue
        row = rows[place]
        if agreed.new_tokens[place]:
            tokens = _empty(agreed.dtypes[place], agreed.widths[place], device)
            if sample is not None:
                chosen = mine[row]
                tokens[chosen] = sample.tokens.to(tokens.dtype)[slot[row][chosen]]
            tokens = sum_over_processes(tokens)
        found[name] = Sample(keys=kept[row], tokens=tokens, output_power=power[place])
    return found, {name for name, new in zip(names, agreed.fresh, strict=True) if not new}


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What all processes know of each layer's samples."""

    fresh: list[int]
    """Whether any process has one since the last event."""
    dtypes: list[int]
    """Place in `_DTYPES`; -1 where nobody has a sample."""
    widths: list[int]
    """Of a token; 0 for ids."""
    new_keys: list[int]
    """Whether its keys are not those of the layer before, on any process."""
    new_tokens: list[int]
    """The same of its tokens."""


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
    """Return the place of its tokens' dtype in `_DTYPES`, and their width; 0 for ids."""
    if sample is None:
        return -1, 0
    width = sample.tokens.shape[1] if sample.tokens.dim() == 2 else 0
    return _DTYPES.index(sample.tokens.dtype), width


def _empty(dtype: int, width: int, device: torch.device | None) -> Any:
    shape = (SAMPLE_SIZE, width) if width else (SAMPLE_SIZE,)
    return torch.zeros(shape, dtype=_DTYPES[dtype], device=device)
