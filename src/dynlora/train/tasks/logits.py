"""Compute logits per batch for predictions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from dynlora.train.task import Predictor


def batch_logits(
    predictor: Predictor, inputs: Any, collator: Callable[[list[Any]], Any]
) -> Iterator[torch.Tensor]:
    """Yield the float32 logits per batch, on the CPU, in row order.

    Args:
        predictor: Model and batch size.
        inputs: `datasets.Dataset` of model inputs.
        collator: Combines rows into a batch.
    """
    model = predictor.model.eval()
    device = next(model.parameters()).device
    loader: DataLoader[Any] = DataLoader(
        inputs, batch_size=predictor.batch_size, collate_fn=collator
    )
    for batch in loader:
        moved = {name: value.to(device) for name, value in batch.items()}
        with torch.no_grad():
            logits = model(**moved).logits
        yield logits.float().cpu()
