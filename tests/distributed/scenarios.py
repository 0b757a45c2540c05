"""What several processes train, and one process with them as its reference."""

import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.adapters.layers import find_lora_layers
from tests.layer_kinds import EXPERTS as EXPERT_TARGETS
from tests.layer_kinds import bare_mixtral
from tests.models import WINDOW, adamw, bare_llama, sequences

STEPS, RESUMED_AT = 30, 13
LOST_AT = 14
"""Between two events, and one step after a checkpoint."""
EXPERTS = "experts"
SCENARIOS = ("signal", "activation_ratio", "attention_entropy")
"""By metric: one reads gradients, which processes share; one inputs; and one attention."""
ENGINES = {
    "ddp": SCENARIOS,
    "accelerate_ddp": ("signal",),
    "fsdp2": ("activation_ratio", "attention_entropy"),
    "accelerate_fsdp2": (EXPERTS,),
}
"""Scenarios by engine; Accelerate wraps the optimizer too. `EXPERTS` are of a mixture."""
COMPILED = ("ddp attach", "compile ddp attach", "attach ddp compile", "parts ddp attach")
"""Orders of attaching, wrapping and compiling; the first is the reference."""
CONFIG = {"total_steps": STEPS, "hysteresis": 0, **WINDOW}
OWN: dict[str, dict[str, Any]] = {
    "activation_ratio": {"budget_end": 0.5},
    EXPERTS: {"importance": "signal"},
}
"""Settings of single scenarios."""


def config_of(scenario: str) -> DynamicLoraConfig:
    """Return the settings of a scenario."""
    return DynamicLoraConfig(**{"importance": scenario} | CONFIG | OWN.get(scenario, {}))


def bare_model(scenario: str) -> PreTrainedModel:
    """Return the base model of a scenario in float64."""
    if scenario != EXPERTS:
        return bare_llama().double()
    model = bare_mixtral().double()
    model.set_experts_implementation("eager")  # torch's grouped products are of float32
    return model


def model_in_float64(scenario: str = "signal") -> nn.Module:
    """Return the same model in every process."""
    targets = EXPERT_TARGETS if scenario == EXPERTS else {"target_modules": "all-linear"}
    base = bare_model(scenario)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **targets)).double().train()


def optimizer_of(model: nn.Module) -> AdamW:
    """Return the optimizer of all runs."""
    return adamw(model, weight_decay=0.01)


def alone(scenario: str) -> tuple[DynamicLora, nn.Module, AdamW]:
    """Return a controller, its model and optimizer, in this process."""
    model = model_in_float64(scenario)
    optimizer = optimizer_of(model)
    return DynamicLora(model, optimizer, config_of(scenario)), model, optimizer


def batches(first: int, last: int, *, part: int | None = None) -> Iterator[Tensor]:
    """Yield the batches of some steps; with `part` only every second row of each, from that one."""
    for tokens in itertools.islice(sequences(), first, last):
        yield tokens if part is None else tokens[part::2]


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what of the model is saved of its LoRA layers."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "lora_" in k}


def found_by(dynamic: DynamicLora, **others: object) -> dict[str, object]:
    """Return what a process found, for the tests to compare."""
    history = [event.to_dict() for event in dynamic.history]
    return {"ranks": dynamic.ranks, "history": history, **others}


def base_norms(model: nn.Module) -> list[float]:
    """Return the norm of each adapted layer's frozen weight."""
    return [layer.base_norm for layer in find_lora_layers(model, None)]


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not the same to the last bit."""
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def leave() -> NoReturn:
    """End this process after all processes have finished their work.

    Skips the destructors, because they can wait forever: `DistributedDataParallel` keeps the
    interpreter's lock while it joins Gloo's threads, and these need the lock to free a tensor.
    """
    distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
