"""Starts that move a part of the base model into the adapter (PiSSA, OLoRA), and the way back.

PEFT then trains on a base model that is not the original one. What a run saves must fit the
original, so the first factors are kept, and what is saved is the difference: with first factors
``A0, B0`` the change is ``B @ A - B0 @ A0``, which is one product of twice the rank.

PEFT has that conversion too (`path_initial_model_for_weight_conversion`), but its 0.21 leaves out
what was trained in full beside the adapter, such as a task's head.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from dynlora.errors import ConfigError
from dynlora.saved.adapter import CONFIG, PREFIX, read_adapter, write_adapter
from dynlora.starts import changes_base
from dynlora.train.config.adapter import LoraSettings

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""First `lora_A` and `lora_B` by module name in the base model."""


def takes_from_base(lora: LoraSettings) -> bool:
    """Return whether a new adapter begins with a part of the base model's weights."""
    return lora.start_from is None and changes_base(lora.init_lora_weights)


def first_factors(model: Any, start: str) -> Factors:
    """Return copies of the factors that a new adapter begins with.

    Args:
        model: PEFT's, with an adapter that took its share of the base model's weights.
        start: Its `init_lora_weights`.

    Raises:
        ConfigError: If a layer could not give its share away as it should have.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = path.removeprefix(PREFIX)
        weight, rank = layer.get_base_layer().weight, layer.r["default"]
        if not _gave_its_part(layer, start):
            raise ConfigError(
                f"`lora.init_lora_weights: {start}` needs linear layers with at least "
                f"lora.r={rank} inputs and outputs, got {name!r} of type "
                f"{type(layer.get_base_layer()).__name__} with weight {tuple(weight.shape)}: "
                "lower `lora.r`, leave the layer out of `lora.target_modules`, or use another "
                "start."
            )
        if uses[id(weight)] > 1:
            raise ConfigError(
                f"`lora.init_lora_weights: {start}` needs layers with weights of their own, got "
                f"{name!r}, whose weight another module uses too: leave it out of "
                "`lora.target_modules`, or use another start."
            )
        halves = layer.lora_A["default"], layer.lora_B["default"]
        found[name] = (halves[0].weight.detach().clone(), halves[1].weight.detach().clone())
    return found


def _gave_its_part(layer: LoraLayer, start: str) -> bool:
    """Return whether PEFT has done with a layer what the start says."""
    if "default" not in layer.lora_A:
        return False  # an embedding: it begins as ever
    if start == "olora" and layer.fan_in_fan_out:
        return False  # peft 0.21 takes the transposed weight for the weight
    return bool(layer.lora_A["default"].weight.shape == (layer.r["default"], layer.in_features))


def write_difference(model: Any, first: Factors, output: Path) -> None:
    """Save the adapter as a plain one of the original base model, of twice the rank.

    Args:
        model: PEFT's, trained.
        first: The factors that it began with.
        output: Where; what is there is replaced.

    Raises:
        AdapterError: If it cannot be written, or a weight is not finite.
    """
    with TemporaryDirectory() as nowhere:
        draft = Path(nowhere) / "adapter"
        model.save_pretrained(draft)
        path = draft / CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"init_lora_weights": True}), encoding="utf-8")
        trained = read_adapter(draft)
        doubled = []
        for layer in trained.layers:
            A, B = (factor.to(layer.lora_A) for factor in first[layer.name])
            # The scaling stays: it divides by the rank, or with rsLoRA by its square root.
            stretch = 2**0.5 if layer.use_rslora else 2
            doubled.append(
                replace(
                    layer,
                    lora_A=torch.cat([layer.lora_A, A]),
                    lora_B=torch.cat([layer.lora_B, -B], dim=1),
                    lora_alpha=layer.lora_alpha * stretch,
                )
            )
        shutil.rmtree(output, ignore_errors=True)
        write_adapter(trained.with_layers(doubled), output)
