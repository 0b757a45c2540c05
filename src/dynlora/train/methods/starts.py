"""Initializations that move part of the base weights into the adapter (PiSSA, OLoRA).

PEFT then trains on a modified base model, but the saved adapter must fit the original one. With
initial factors ``A0, B0`` the saved change is ``B @ A - B0 @ A0``: one product of twice the rank.

PEFT 0.21 has this conversion (`path_initial_model_for_weight_conversion`), but leaves out modules
trained in full, such as a task's head.
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

from dynlora.adapter_files.adapter import CONFIG, PREFIX, read_adapter, write_adapter
from dynlora.adapters.patterns import changes_base
from dynlora.errors import ConfigError
from dynlora.train.config.adapter import LoraSettings

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Initial `lora_A` and `lora_B` by module name in the base model."""


def takes_from_base(lora: LoraSettings) -> bool:
    """Return whether a new adapter is initialized with part of the base model's weights."""
    return lora.start_from is None and changes_base(lora.init_lora_weights)


def first_factors(model: Any, start: str) -> Factors:
    """Return copies of a new adapter's initial factors.

    Args:
        model: PEFT model whose adapter was initialized from the base weights.
        start: Its `init_lora_weights`.

    Raises:
        ConfigError: If a layer is too small, of an unsupported type, or shares its weight with
            another module.
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
    """Return whether PEFT applied the initialization to a layer."""
    if "default" not in layer.lora_A:
        return False  # embeddings keep the default initialization
    if start == "olora" and layer.fan_in_fan_out:
        return False  # peft 0.21 ignores that the weight is transposed
    return bool(layer.lora_A["default"].weight.shape == (layer.r["default"], layer.in_features))


def write_difference(model: Any, first: Factors, output: Path) -> None:
    """Save a plain LoRA adapter for the original base model, with twice the rank.

    Args:
        model: Trained PEFT model.
        first: Initial factors.
        output: Folder to write; replaced if it exists.

    Raises:
        AdapterError: If the folder cannot be written, or a weight is not finite.
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
            # Keep the scaling, which divides by the rank, or with rsLoRA by its square root.
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
