"""Fused forwards of LoRA layers.

PEFT runs a chain of operations per layer, each of which reads and writes tensors as large as the
layer's output. The fused forward scales the output of ``A`` instead, and adds in place or merges.
No output is cached between calls.
"""

from contextlib import nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from dynlora.engines.sharding import is_sharded
from dynlora.fused import parameters
from dynlora.fused.function import lora_linear

LEAST_ELEMENTS = 2**18
"""Elements of a layer's input and output together from which fusing is faster on a CPU; measured
with widths of 64 to 768 and ranks of 8 and 32."""


class _FusedLayer:
    """Forward of one layer that replaces PEFT's."""

    def __init__(self, module: PeftLinear, owner: "FusedLora") -> None:
        self._module = module
        self._owner = owner
        self._weight: Tensor | None = None
        self._weight_of: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the weight copy from copies of the model."""
        return vars(self) | {"_weight": None, "_weight_of": ()}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        other = args or kwargs or not self._owner.is_open or torch.compiler.is_compiling()
        if other or not self._is_linear or not self._pays(x) or not self._fits(x):
            # Called on the class, because a pickled bound method would resolve to this object.
            return cast(Tensor, PeftLinear.forward(self._module, x, *args, **kwargs))
        return self._fused(x)

    @property
    def _base(self) -> nn.Linear:
        return cast(nn.Linear, self._module.base_layer)

    @property
    def _is_linear(self) -> bool:
        """Whether the base layer, which may have been replaced, is a plain linear layer."""
        return type(self._base) is nn.Linear

    def _pays(self, x: Tensor) -> bool:
        """Return whether fusing saves more time than its Python call costs."""
        rows = x.numel() // max(x.shape[-1], 1)
        return x.device.type != "cpu" or rows * sum(self._base.weight.shape) >= LEAST_ELEMENTS

    def _fits(self, x: Tensor) -> bool:
        """Return whether this call can be fused; PEFT's forward computes all others."""
        module, adapters = self._module, self._module.active_adapters
        if (
            len(adapters) != 1
            or adapters[0] not in module.lora_A
            or module.disable_adapters
            or module.merged
            or adapters[0] in module.lora_variant
            or not torch.is_grad_enabled()
            or x.dim() < 2
        ):
            return False
        weight, bias = self._base.weight, self._base.bias
        factors = (module.lora_A[adapters[0]], module.lora_B[adapters[0]])
        dropout = module.lora_dropout[adapters[0]]
        watched = any(map(_is_watched, (self._base, *factors, dropout)))
        kinds = {*map(type, factors)}
        if watched or kinds != {nn.Linear} or type(dropout) not in (nn.Identity, nn.Dropout):
            return False
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        if factors[1].bias is not None or is_sharded(factors[1].weight):
            return False  # FSDP2 gathers weights only during the layer's forward
        weights = (weight, factors[0].weight, factors[1].weight)
        if torch.is_autocast_enabled(x.device.type):
            # Autocast does not cast float64.
            return all(part.is_floating_point() and part.dtype.itemsize < 8 for part in (x, weight))
        return all(bool(x.dtype == part.dtype) for part in weights)

    def _fused(self, x: Tensor) -> Tensor:
        module, adapter = self._module, self._module.active_adapters[0]
        dropout = module.lora_dropout[adapter]
        drops = not isinstance(dropout, nn.Identity) and dropout.training
        lora_A, lora_B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        device, bias = x.device.type, self._base.bias
        casts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if casts else x.dtype
        dropped = dropout(x) if drops else None
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            return lora_linear(
                x,
                dropped,
                self._weight_in(dtype),
                None if bias is None else bias.to(dtype),
                float(module.scaling[adapter]),
                lora_A,
                lora_B,
            )

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the base weight in a dtype, as a copy that serves until the weight changes.

        Autocast would copy the weight in each forward and keep it until the backward pass ends.
        """
        weight = self._base.weight
        if weight.dtype == dtype:
            return weight
        if not self._owner.keeps_copies:
            return weight.detach().to(dtype)
        state = (weight.data_ptr(), weight._version, weight.device, dtype)
        if self._weight is None or self._weight_of != state:
            self._weight, self._weight_of = weight.detach().to(dtype), state
        return self._weight

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the module that install this forward."""
        return {"forward": self, "merge": self.merge, "_dynlora_fused": self._owner}

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Drop the weight copy and call PEFT's `merge`, which does not change the version."""
        self.forget()
        PeftLinear.merge(self._module, *args, **kwargs)

    def forget(self) -> None:
        """Free the weight copy."""
        self._weight, self._weight_of = None, ()


class _FusedParameter:
    """Forward of LoRA on a parameter that replaces PEFT's."""

    def __init__(self, module: ParamWrapper, owner: "FusedLora") -> None:
        self._module = module
        self._owner = owner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._owner.is_open and parameters.computes(self._module, kwargs)
        return (parameters.forward if own else ParamWrapper.forward)(self._module, *args, **kwargs)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the module that install this forward."""
        return {"forward": self, "_dynlora_fused": self._owner}

    def forget(self) -> None:
        """Keep nothing between calls."""


class FusedLora:
    """Fused forwards of a model's LoRA layers, until `close`.

    An earlier `FusedLora` of the model is closed. PEFT's forward still computes every call that
    cannot be fused: quantized bases, DoRA, several active adapters, inference, `torch.compile`.

    Under autocast each layer keeps a copy of its frozen weight in the lower precision. The copy
    misses edits through `weight.data`, except by PEFT's `merge`.

    Examples:
        >>> fused = FusedLora(model)
        >>> ...  # train
        >>> fused.close()
    """

    def __init__(self, model: nn.Module) -> None:
        """Install the fused forwards.

        Args:
            model: Model with PEFT LoRA layers.
        """
        close_fused(model)
        # Under FSDP2 a copy would contain the whole weight instead of a shard.
        self.keeps_copies = not any(hasattr(module, "unshard") for module in model.modules())
        """Whether layers keep a copy of their weight in autocast's dtype between steps."""
        self._modules = {n: m for n, m in model.named_modules() if _is_plain(m) or _is_parameter(m)}
        self._layers = [
            _FusedParameter(m, self) if _is_parameter(m) else _FusedLayer(m, self)
            for m in self._modules.values()
        ]
        self.is_open = False
        """Whether layers are fused; closed layers that a wrapper still calls run PEFT's forward."""
        self.open()

    @property
    def layers(self) -> list[str]:
        """Names of the fused modules."""
        return list(self._modules)

    def open(self) -> None:
        """Install the fused forwards, unless installed."""
        for module, layer in zip(self._modules.values(), self._layers, strict=True):
            vars(module).update(layer.attributes)
        self.is_open = True

    def close(self) -> None:
        """Restore PEFT's forward in every layer."""
        for module, layer in zip(self._modules.values(), self._layers, strict=True):
            # All other attributes are of a wrapper or a later `FusedLora`.
            for name, value in layer.attributes.items():
                if vars(module).get(name) == value:
                    delattr(module, name)
            layer.forget()
        self.is_open = False


def close_fused(model: nn.Module) -> None:
    """Close the model's `FusedLora`, if any, whose owner may no longer exist."""
    for module in model.modules():
        fused = vars(module).get("_dynlora_fused")
        if fused is not None:
            fused.close()


def _is_watched(module: nn.Module) -> bool:
    """Return whether a module has hooks or a replaced forward."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in vars(module)


def _is_parameter(module: nn.Module) -> bool:
    """Return whether a module is PEFT's LoRA on a parameter, with PEFT's forward."""
    return type(module) is ParamWrapper and "forward" not in vars(module)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is PEFT's LoRA on a plain linear layer, with PEFT's forward."""
    return (
        type(module) is PeftLinear
        and type(module.base_layer) is nn.Linear
        and type(module.base_layer.weight) is nn.Parameter
        and not module.lora_variant
        and "forward" not in vars(module)
    )
