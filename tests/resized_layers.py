"""Helpers that resize one layer, and inputs to resize it by."""

import torch
from torch.optim import AdamW

from dynlora.adapters.resize import apply_change, grow_change, new_rows, shrink_changes
from dynlora.adapters.strengths import measure_strengths


def grow(layer, rank, *, tokens=None, seed=0, optimizer=None):
    generator = torch.Generator().manual_seed(seed)
    [growth] = new_rows([layer], [rank - layer.r], [tokens], generator=generator)
    apply_change(layer, optimizer or optimizer_of(layer), grow_change(layer, rank), growth)


def shrink(layer, rank, *, tokens=None, optimizer=None):
    strengths = measure_strengths([layer], [tokens])
    [change] = shrink_changes([layer], strengths, [rank])
    apply_change(layer, optimizer or optimizer_of(layer), change)


def optimizer_of(layer):
    return AdamW([layer.lora_A, layer.lora_B], lr=0.01)


def tokens_along(*spreads, width=12, count=200, seed=0):
    """Return inputs with these standard deviations along random orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    noise = torch.randn(count, len(spreads), generator=generator)
    return (noise * torch.tensor(spreads)) @ directions[:, : len(spreads)].T + 1.0
