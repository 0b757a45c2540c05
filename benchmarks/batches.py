"""Batches of texts of similar length, in an order that depends only on the seed."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

GROUPED = 50
"""Batches whose texts are sorted by length together."""


def epoch_batches(
    lengths: Int[Tensor, " texts"], generator: torch.Generator, *, size: int
) -> Iterator[list[int]]:
    """Yield the batches of one epoch: random groups sorted by length, in a random order."""
    order = torch.randperm(len(lengths), generator=generator)
    groups = order.split(size * GROUPED)
    ordered = torch.cat([group[lengths[group].argsort(stable=True)] for group in groups])
    batches = ordered.split(size)
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[number].tolist()


def training_batches(
    lengths: Int[Tensor, " texts"], *, size: int, seed: int, steps: int
) -> Iterator[list[int]]:
    """Yield one batch per step, for as many epochs as needed.

    Args:
        lengths: Length of each text in tokens.
        size: Texts per batch.
        seed: Seed of the order.
        steps: Number of batches.
    """
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        for batch in epoch_batches(lengths, generator, size=size):
            if done == steps:
                return
            yield batch
            done += 1
