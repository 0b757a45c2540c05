"""EVA initialization: `lora_A` from the principal directions of each layer's inputs.

PEFT computes them from the run's own first batches, without labels. Every layer keeps its rank
(`rho` 1), because EVA's rank redistribution would change the parameter count.
"""

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor
from torch.utils.data import DataLoader

from dynlora.errors import ConfigError
from dynlora.train.trainer import without_trace

PATIENCE = 3
"""Maximum passes over the training data for EVA to converge, of at least 100 batches each."""


def begin_with_eva(trainer: Any, model: Any) -> None:
    """Set `lora_A` of every layer to the first principal directions of its inputs.

    Embeddings and convolutions, which EVA does not support, keep their weights. Torch's random
    state does not change.

    Args:
        trainer: Supplies row order, batch size and collator.
        model: PEFT model with a new adapter; `lora_A` is changed in place.

    Raises:
        ConfigError: If the directions of a layer do not converge.

    Reference:
        Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        arXiv 2410.07170.
    """
    loader = DataLoader(
        trainer.train_dataset,
        batch_size=trainer.args.train_batch_size,
        sampler=trainer.sampler,
        collate_fn=trainer.data_collator,
    )
    own = model.peft_config["default"]
    eva = LoraConfig(r=own.r, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    with without_trace(), redirect_stdout(io.StringIO()):
        found = get_eva_state_dict(
            model,
            loader,
            eva,
            forward_fn=_Forward(PATIENCE * max(len(loader), 100), own.r),
            prepare_model_inputs_fn=_mask,
            prepare_layer_inputs_fn=_tokens,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    for name, directions in found.items():
        weight = model.get_submodule(name).lora_A["default"].weight
        weight.data.copy_(directions)


class _Forward:
    """Forward pass without labels; limits the batches, because PEFT repeats until convergence."""

    def __init__(self, most: int, rank: int) -> None:
        self.most = most
        self.rank = rank
        self.count = 0

    def __call__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        if self.count == self.most:
            raise ConfigError(
                f"`lora.init_lora_weights: eva` needs inputs that vary in lora.r={self.rank} "
                f"directions in every layer, got none that settle in {self.most} batches: lower "
                "`lora.r`, raise `training.batch_size`, or leave out layers that see few inputs."
            )
        self.count += 1
        model(**{key: value for key, value in inputs.items() if key != "labels"})


def _mask(inputs: Mapping[str, Any], _config: Any) -> Tensor | None:
    return inputs.get("attention_mask")


def _tokens(layer_inputs: Any, mask: Tensor | None, _name: str) -> Tensor:
    """Return a layer's inputs as rows, without padding if the mask matches their shape."""
    inputs: Tensor = layer_inputs if torch.is_tensor(layer_inputs) else layer_inputs[0]
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()
