"""View of PEFT's LoRA layers: find and read them, and keep their fields consistent.

`layer.r`, `lora_alpha`, `scaling` and the tensors' shapes always agree, because PEFT's `set_scale`
and `unscale_layer` recompute one from the others.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer as PeftLoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn import Parameter

from dynlora.adapters.factor import Factor
from dynlora.adapters.kinds import LayerKind, Rows, kind_of
from dynlora.engines.fsdp import check_sharding
from dynlora.engines.sharding import has_gradient, is_held, whole
from dynlora.errors import LayerError
from dynlora.types import Tokens

_UNIT_SCALING = "lora_unit_scaling"


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of one layer in one step."""

    A: Tensor
    B: Tensor
    finite: Tensor


@dataclass(frozen=True, slots=True)
class LoraView:
    """One adapter of one PEFT LoRA layer of any kind; see `types.LoraLayer`."""

    name: str
    module: Any
    """The `peft.tuners.lora.LoraLayer`."""
    adapter: str
    kind: LayerKind
    factor_A: Factor
    factor_B: Factor
    in_features: int
    out_features: int
    gradients: Gradients | None = None
    """Gradients read once for this step; None reads them on each access."""

    @property
    def experts(self) -> int:
        """Number of matrices of rank r per factor: 1 except for stacks of experts."""
        return self.factor_A.experts

    @property
    def cost(self) -> int:
        """Parameters per rank, over all experts."""
        return self.experts * (self.in_features + self.out_features)

    @property
    def widest(self) -> int:
        """Rank of a full update of the layer."""
        return min(self.in_features, self.out_features)

    @property
    def is_there(self) -> bool:
        """Whether the adapter was never deleted; otherwise all other properties are invalid."""
        if self.adapter not in self.module.r:
            return False
        now, _ = self.kind.factors(self.module, self.adapter)
        return now.parameter is self.factor_A.parameter

    @property
    def r(self) -> int:
        """Rank."""
        return int(self.module.r[self.adapter])

    @property
    def scaling(self) -> float:
        """Factor on the layer's output."""
        return float(self.module.scaling[self.adapter])

    @property
    def unit_scaling(self) -> float:
        """Scaling without the layer weight. A scaling set by other code counts as unweighted."""
        unit, weighted = vars(self.module).get(_UNIT_SCALING, {}).get(self.adapter, (0.0, None))
        return float(unit) if weighted == self.scaling else self.scaling

    @property
    def weight(self) -> float:
        """Layer weight: `scaling` over `unit_scaling`."""
        unit = self.unit_scaling
        return 1.0 if self.scaling == unit else self.scaling / unit

    @property
    def alpha(self) -> float:
        """`lora_alpha` from which PEFT computes this scaling, exactly if such a number exists."""
        divisor = math.sqrt(self.r) if self.module.use_rslora[self.adapter] else self.r
        product = self.scaling * divisor
        neighbours = (math.nextafter(product, 0), math.nextafter(product, math.inf))
        candidates = (round(product, 9), product, *neighbours)
        return next((a for a in candidates if a / divisor == self.scaling), product)

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """Both factors, `lora_A` first."""
        return self.factor_A, self.factor_B

    @property
    def bias(self) -> Factor | None:
        """Bias of `lora_B`, which `scaling` multiplies, of shape ``(out, 1)``; None without."""
        if not self.module.lora_bias[self.adapter]:
            return None
        column = partial(torch.unsqueeze, dim=-1)
        return Factor(self.module.lora_B[self.adapter], "bias", 0, column, torch.flatten)

    @property
    def parameters(self) -> list[Parameter]:
        """PEFT's parameters for `lora_A` and `lora_B`."""
        return [factor.parameter for factor in self.factors]

    @property
    def is_trained(self) -> bool:
        """Whether both weights currently require gradients."""
        return all(parameter.requires_grad for parameter in self.parameters)

    @property
    def lora_A(self) -> Tensor:
        """Matrix of shape ``(r, in_features)``, or ``(experts, r, in_features)``."""
        return self.factor_A.matrix

    @property
    def lora_B(self) -> Tensor:
        """Matrix of shape ``(out_features, r)``, or ``(experts, out_features, r)``."""
        return self.factor_B.matrix

    @property
    def has_gradients(self) -> bool:
        """Whether both weights have gradients."""
        return all(has_gradient(parameter) for parameter in self.parameters)

    @property
    def grad_A(self) -> Tensor:
        """Gradient of `lora_A`; zeros if missing."""
        return self.factor_A.gradient if self.gradients is None else self.gradients.A

    @property
    def grad_B(self) -> Tensor:
        """Gradient of `lora_B` without the layer weight; zeros if missing."""
        if self.gradients is not None:
            return self.gradients.B
        gradient, weight = self.factor_B.gradient, self.weight
        return gradient if weight == 1 else gradient / weight

    @property
    def finite(self) -> Tensor:
        """Whether all elements of both gradients are finite: a boolean of shape ``()``."""
        if self.gradients is not None:
            return self.gradients.finite
        return are_finite([(self.grad_A, self.grad_B)])[0]

    @property
    def base_norm(self) -> float:
        """Root mean square norm of the base layer's output on unit-covariance input."""
        return float(whole(self.kind.weight(self.module)).norm())

    @property
    def is_active(self) -> bool:
        """Whether a forward adds this adapter's output."""
        active = self.adapter in self.module.active_adapters
        return active and not self.module.disable_adapters

    def see(
        self, tokens: Tokens | None
    ) -> tuple[Float[Tensor, "*experts k r"], Float[Tensor, "*experts l r"]]:
        """Return both factors applied to observed tokens, in float64 (see `LayerKind.see`)."""
        return self.kind.see(self.module, self.lora_A.double(), self.lora_B.double(), tokens)

    @torch.no_grad()
    def added_power(self, tokens: Tokens) -> float:
        """Return the mean squared norm of the adapter's output on these tokens."""
        left, right = self.see(tokens)
        return self.scaling**2 * float(((left.mT @ left) * (right.mT @ right)).sum())

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens of its forwards can be read."""
        return self.kind.rows is not None

    def rows(self, inputs: Tensor, output: Tensor) -> Rows:
        """Return the tokens of one forward."""
        assert self.kind.rows is not None
        return self.kind.rows(self.module, self.adapter, inputs, output)

    def set_fields(self, *, r: int, scaling: float) -> None:
        """Write this rank and scaling to every field of the PEFT layer."""
        self.module.r[self.adapter] = r
        self.module.scaling[self.adapter] = scaling
        self.module.lora_alpha[self.adapter] = self.alpha
        for factor in self.factors:
            if factor.rank_field is not None:
                setattr(factor.holder, factor.rank_field, r * factor.experts)

    def set_unit_scaling(self, unit: float) -> None:
        """Store the present scaling without layer weight on PEFT's module, for later runs."""
        vars(self.module).setdefault(_UNIT_SCALING, {})[self.adapter] = (unit, self.scaling)


def in_this_step(layers: Sequence[LoraView]) -> list[LoraView]:
    """Return views with their gradients read once, because reading sharded ones is a collective."""
    pairs = [(layer.grad_A, layer.grad_B) for layer in layers]
    return [
        replace(layer, gradients=Gradients(A, B, finite))
        for layer, (A, B), finite in zip(layers, pairs, are_finite(pairs), strict=True)
    ]


@torch.no_grad()
def are_finite(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return whether all elements are finite, per pair of tensors."""
    # Norms overflow in float16, and torch refuses to narrow float64 to float32.
    wide = any(part.dtype == torch.float64 for pair in pairs for part in pair)
    dtype = torch.float64 if wide else torch.float32
    norms_A, norms_B = (torch._foreach_norm(side, 2, dtype) for side in zip(*pairs, strict=True))
    return (torch.stack(norms_A) + torch.stack(norms_B)).isfinite()


def find_lora_layers(model: nn.Module, adapter_name: str | None) -> list[LoraView]:
    """Return the LoRA layers of one adapter (None: the active one), in the model's order."""
    root, _ = find_root(model)
    found = {
        _name_of(path, module): module
        for path, module in root.named_modules()
        if isinstance(module, PeftLoraLayer)
    }
    adapter = adapter_name or _active_adapter(model, found)
    holders = {name: module for name, module in found.items() if adapter in module.r}
    if not holders:
        names = sorted({name for module in found.values() for name in module.r})
        raise LayerError(
            f"Adapter {adapter!r} must hold at least one LoRA layer, got none; the model's LoRA "
            f"adapters are {names}. Name one of them as `adapter_name`."
        )
    layers = [_view(name, module, adapter) for name, module in holders.items()]
    _check_untied(layers)
    return _read_on_one_device(layers)


def _read_on_one_device(layers: list[LoraView]) -> list[LoraView]:
    """Return views that are read on the first layer's device, because scores compare layers."""
    home, *others = [p.device for layer in layers for p in layer.parameters]
    if all(device == home for device in others):
        return layers
    return [
        replace(
            layer,
            factor_A=replace(layer.factor_A, home=home),
            factor_B=replace(layer.factor_B, home=home),
        )
        for layer in layers
    ]


def _name_of(path: str, module: PeftLoraLayer) -> str:
    """Return the name that PEFT's patterns match: of the module, or of its adapted parameter."""
    if isinstance(module, ParamWrapper):  # PEFT nests one per parameter of a module
        return f"{path.replace('.base_layer', '')}.{module.parameter_name}"
    return path


def find_root(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the module that layer names are relative to, and its PEFT configurations."""
    tuners = {n: m for n, m in model.named_modules() if isinstance(m, BaseTuner)}
    if len(tuners) > 1:
        places = [name.removesuffix("base_model").removesuffix(".") for name in tuners]
        raise LayerError(
            f"The model must be one PEFT model, got {len(tuners)} in a {type(model).__name__}: "
            f"{' and '.join(map(repr, places))}. Give the one whose ranks shall move; several "
            "can have a `DynamicLora` each."
        )
    for tuner in tuners.values():
        return tuner.model, tuner.peft_config
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


def _no_layers(model: nn.Module) -> LayerError:
    kinds = Counter(type(module).__name__ for module in model.modules())
    seen = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common(6))
    return LayerError(
        f"The model must hold PEFT LoRA layers, got a {type(model).__name__} with none; its most "
        f"frequent module types are {seen}. Wrap it with `peft.get_peft_model(model, "
        "LoraConfig(target_modules='all-linear'))` first."
    )


def _view(name: str, module: Any, adapter: str) -> LoraView:
    kind = kind_of(name, module)
    kind.check(name, module)
    if module.merged:
        raise LayerError(
            f"LoRA layer {name!r} is merged into its base weight: call "
            "`model.unmerge_adapter()` before training."
        )
    if adapter in module.lora_variant and adapter not in module.lora_magnitude_vector:
        variant = type(module.lora_variant[adapter]).__name__
        raise LayerError(
            f"LoRA layer {name!r} must be plain LoRA or DoRA, got the variant {variant}, whose "
            "state does not follow a change of rank: turn the variant off in `LoraConfig`."
        )
    factor_A, factor_B = kind.factors(module, adapter)
    for weight in (factor_A.parameter, factor_B.parameter):
        if type(weight) is not Parameter:
            check_sharding(weight)
    return LoraView(name, module, adapter, kind, factor_A, factor_B, factor_A.width, factor_B.width)


def _check_untied(layers: list[LoraView]) -> None:
    """Check that no two layers share memory, because a resize would untie them."""
    owners: dict[int, str] = {}
    for layer in layers:
        for parameter in layer.parameters:
            # Not the storage, because separate weights may be slices of one buffer.
            place = id(parameter) if is_held(parameter) else parameter.data_ptr()
            owner = owners.setdefault(place, layer.name)
            if owner != layer.name:
                raise LayerError(
                    f"Each LoRA layer must have weights of its own, got {layer.name!r} tied to "
                    f"{owner!r}: set `ensure_weight_tying=False` in `LoraConfig`, or leave one of "
                    "them out of `target_modules`."
                )
