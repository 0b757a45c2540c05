"""View of PEFT's LoRA layers: find them, read them, keep their fields consistent.

`layer.r`, `lora_alpha`, `scaling` and the tensors' shapes always tell the same rank, in PEFT's own
terms, because its `set_scale` and `unscale_layer` recompute one from the others.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn import Parameter

from dynlora.errors import EngineError, LayerError


@dataclass(frozen=True, slots=True)
class LinearLora:
    """One adapter of one PEFT LoRA layer on an `nn.Linear`; see `types.LoraLayer`."""

    name: str
    module: Any
    """The `peft.tuners.lora.Linear`."""
    adapter: str

    @property
    def in_features(self) -> int:
        """Columns of `lora_A`."""
        return int(self.module.in_features)

    @property
    def out_features(self) -> int:
        """Rows of `lora_B`."""
        return int(self.module.out_features)

    @property
    def cost(self) -> int:
        """Parameters that one rank takes."""
        return self.in_features + self.out_features

    @property
    def r(self) -> int:
        """Live rank."""
        return int(self.module.r[self.adapter])

    @property
    def scaling(self) -> float:
        """Factor on the layer's output."""
        return float(self.module.scaling[self.adapter])

    @property
    def alpha(self) -> float:
        """The `lora_alpha` from which PEFT computes this scaling, exactly where one number does."""
        divisor = math.sqrt(self.r) if self._use_rslora else self.r
        product = self.scaling * divisor
        neighbours = (math.nextafter(product, 0), math.nextafter(product, math.inf))
        candidates = (round(product, 9), product, *neighbours)
        return next((a for a in candidates if a / divisor == self.scaling), product)

    @property
    def lora_A(self) -> Parameter:
        """Weight of shape ``(r, in_features)``."""
        weight: Parameter = self.module.lora_A[self.adapter].weight
        return weight

    @property
    def lora_B(self) -> Parameter:
        """Weight of shape ``(out_features, r)``."""
        weight: Parameter = self.module.lora_B[self.adapter].weight
        return weight

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass has reached both weights."""
        return self.lora_A.grad is not None and self.lora_B.grad is not None

    @property
    def grad_A(self) -> Tensor:
        """Gradient of `lora_A`; zeros where no backward pass left one."""
        return _gradient(self.lora_A)

    @property
    def grad_B(self) -> Tensor:
        """Gradient of `lora_B`; zeros where no backward pass left one."""
        return _gradient(self.lora_B)

    @property
    def _use_rslora(self) -> bool:
        return bool(self.module.use_rslora[self.adapter])

    def set_fields(self, *, r: int, scaling: float) -> None:
        """Make every field of the PEFT layer tell this rank and scaling."""
        self.module.r[self.adapter] = r
        self.module.scaling[self.adapter] = scaling
        self.module.lora_alpha[self.adapter] = self.alpha
        self.module.lora_A[self.adapter].out_features = r
        self.module.lora_B[self.adapter].in_features = r


def find_lora_layers(model: nn.Module, adapter_name: str | None) -> list[LinearLora]:
    """Return the LoRA layers of one adapter, in the model's order.

    Args:
        model: A PEFT model, or any module that holds injected LoRA layers.
        adapter_name: The adapter; None for the active one.

    Raises:
        LayerError: If there is no LoRA layer, several adapters are active and none is named, or a
            layer cannot be resized.
        EngineError: If an engine has sharded or wrapped the parameters.
    """
    root, _ = find_root(model)
    found = {
        name: module for name, module in root.named_modules() if isinstance(module, PeftLoraLayer)
    }
    adapter = adapter_name or _active_adapter(model, found)
    layers = [
        LinearLora(name, module, adapter) for name, module in found.items() if adapter in module.r
    ]
    if not layers:
        names = sorted({name for module in found.values() for name in module.r})
        raise LayerError(
            f"Adapter {adapter!r} must hold at least one LoRA layer, got none; the model's LoRA "
            f"adapters are {names}. Name one of them as `adapter_name`."
        )
    for layer in layers:
        _check_layer(layer)
    return layers


def find_root(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the module that adapter names are relative to, and its PEFT configurations.

    Raises:
        LayerError: If no adapter was ever attached.
    """
    for module in model.modules():
        if isinstance(module, BaseTuner):
            return module.model, module.peft_config
    for module in model.modules():
        if "peft_config" in vars(module):
            return module, vars(module)["peft_config"]
    raise _no_layers(model)


def _active_adapter(model: nn.Module, found: dict[str, Any]) -> str:
    if not found:
        raise _no_layers(model)
    active = sorted({name for module in found.values() for name in module.active_adapters})
    if len(active) != 1:
        raise LayerError(
            f"Exactly one LoRA adapter must be active, got {active}: name the one whose ranks "
            "shall move as `adapter_name`."
        )
    return str(active[0])


def _gradient(parameter: Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _no_layers(model: nn.Module) -> LayerError:
    kinds = Counter(type(module).__name__ for module in model.modules())
    seen = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(6))
    return LayerError(
        f"The model must hold PEFT LoRA layers, got a {type(model).__name__} with none; its most "
        f"frequent module types are {seen}. Wrap it with `peft.get_peft_model(model, "
        "LoraConfig(target_modules='all-linear'))` first."
    )


def _check_layer(layer: LinearLora) -> None:
    module, adapter = layer.module, layer.adapter
    kind = type(module)
    if kind is not PeftLinear or not isinstance(module.get_base_layer(), nn.Linear):
        base = type(module.get_base_layer()).__name__
        raise LayerError(
            f"LoRA layer {layer.name!r} must be on an nn.Linear, got {kind.__module__}."
            f"{kind.__name__} on {base}: leave it out of `target_modules`."
        )
    if module.merged:
        raise LayerError(
            f"LoRA layer {layer.name!r} is merged into its base weight: call "
            "`model.unmerge_adapter()` before training."
        )
    if adapter in module.lora_variant:
        variant = type(module.lora_variant[adapter]).__name__
        raise LayerError(
            f"LoRA layer {layer.name!r} must be plain LoRA, got the variant {variant}, whose state "
            "does not follow a change of rank: turn the variant off in `LoraConfig`."
        )
    if module.lora_bias[adapter]:
        raise LayerError(
            f"LoRA layer {layer.name!r} must have no bias on lora_B, got `lora_bias=True`: set it "
            "to False."
        )
    for weight in (layer.lora_A, layer.lora_B):
        if type(weight) is not Parameter or type(weight.data).__name__ == "DTensor":
            raise EngineError(
                f"LoRA layer {layer.name!r} must hold whole parameters, got a "
                f"{type(weight.data).__name__}: sharded training is not supported yet; train in "
                "one process."
            )
