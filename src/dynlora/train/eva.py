"""EVA: a new adapter's `lora_A` from the directions in which the training data's inputs vary.

PEFT computes them; here it gets the very batches that the run begins with, without labels. Every
layer keeps its rank (`rho` 1): EVA can also hand ranks out anew before training, but then layers of
different sizes hold another number of parameters than LoRA's.
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
"""Passes over the training data, or hundreds of batches if that is more, to settle in."""


def begin_with_eva(trainer: Any, model: Any) -> None:
    """Give every layer's `lora_A` the first principal directions of its inputs.

    Layers that EVA does not know (embeddings, convolutions) keep what they have. Nothing is drawn
    from torch's random state.

    Args:
        trainer: Ready to train; its order of rows, batch size and collator are used.
        model: PEFT's, with a new adapter; `lora_A` is changed in place.

    Raises:
        ConfigError: If some layer's directions do not settle.

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
    """The model on a batch without its labels; counts, because PEFT goes on until all settles."""

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
    """Return the rows that a layer sees, without padding where the mask tells of it."""
    inputs: Tensor = layer_inputs if torch.is_tensor(layer_inputs) else layer_inputs[0]
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()
