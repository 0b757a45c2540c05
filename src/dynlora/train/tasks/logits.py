"""A model's logits on rows without labels, batch by batch, for predictions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from dynlora.train.task import Predictor


def batch_logits(
    predictor: Predictor, inputs: Any, collator: Callable[[list[Any]], Any]
) -> Iterator[torch.Tensor]:
    """Yield the float32 logits of each batch, on the CPU, in the order of the rows.

    Args:
        predictor: Model and batch size.
        inputs: `datasets.Dataset` of model inputs.
        collator: Makes a batch of rows.
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
