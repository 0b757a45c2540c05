"""Batches of texts of similar length, in an order that depends only on the seed."""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from dynlora.train.trainer import epoch_batches


def training_batches(
    lengths: Int[Tensor, " texts"], *, size: int, seed: int, steps: int
) -> Iterator[list[int]]:
    """Yield one batch per step, from `epoch_batches`, for as many epochs as needed.

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
