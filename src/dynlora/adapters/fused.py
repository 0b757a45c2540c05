"""Fused forward and backward of LoRA layers: one autograd function per layer.

PEFT runs a layer as a chain of small operations, each of which reads and writes tensors as large
as the layer's output. Here everything is added in place, and between forward and backward no more
is kept than the input and a rank's worth. Each call computes its own output from the layer's
present state: no output is kept for a later call.
"""

from contextlib import nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from dynlora.adapters.fused_linear import FusedLinear
from dynlora.adapters.sharding import is_sharded

LEAST_ELEMENTS = 2**18
"""Elements of a layer's input and output together from which on a fused call is the faster one, on
a CPU; measured with widths of 64 to 768 and ranks of 8 and 32."""


class _FusedLayer:
    """The forward of one layer, in the place of PEFT's."""

    def __init__(self, module: PeftLinear, owner: "FusedLora") -> None:
        self._module = module
        self._base = cast(nn.Linear, module.base_layer)
        self._owner = owner
        self._weight: Tensor | None = None
        self._weight_of: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copy of the weight out of copies of the model."""
        return vars(self) | {"_weight": None, "_weight_of": ()}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = args or kwargs or torch.compiler.is_compiling()
        if given or not self._pays(x) or not self._fits(x):
            # Not a bound method: a pickle would look it up on the module, and find this object.
            return cast(Tensor, PeftLinear.forward(self._module, x, *args, **kwargs))
        return self._fused(x)

    def _pays(self, x: Tensor) -> bool:
        """Return whether fusing saves more than the call of a function written in Python costs."""
        rows = x.numel() // max(x.shape[-1], 1)
        return x.device.type != "cpu" or rows * sum(self._base.weight.shape) >= LEAST_ELEMENTS

    def _fits(self, x: Tensor) -> bool:
        """Return whether this call can be fused: PEFT's own forward does all others."""
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
        if any(_is_watched(part) for part in (self._base, *factors)):
            return False
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return False
        if factors[1].bias is not None or is_sharded(factors[1].weight):
            return False  # sharded outside a forward alone, as of a layer that is not due yet
        weights = (weight, factors[0].weight, factors[1].weight)
        if torch.is_autocast_enabled(x.device.type):
            # Autocast leaves float64 alone.
            return all(part.is_floating_point() and part.dtype.itemsize < 8 for part in (x, weight))
        return all(bool(x.dtype == part.dtype) for part in weights)

    def _fused(self, x: Tensor) -> Tensor:
        module, adapter = self._module, self._module.active_adapters[0]
        dropout = module.lora_dropout[adapter]
        drops = not isinstance(dropout, nn.Identity) and dropout.training
        lora_A, lora_B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        rank = module.r[adapter]
        if len(lora_A) != rank:  # held wider, see `static`
            lora_A, lora_B = lora_A[:rank], lora_B[:, :rank]
        device, bias = x.device.type, self._base.bias
        casts = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if casts else x.dtype
        dropped = dropout(x) if drops else None
        with torch.autocast(device, enabled=False) if casts else nullcontext():
            output = FusedLinear.apply(  # type: ignore[no-untyped-call]
                x,
                dropped,
                self._weight_in(dtype),
                None if bias is None else bias.to(dtype),
                float(module.scaling[adapter]),
                lora_A,
                lora_B,
            )
        # Not in there: what a function returns as a view must not be changed in place.
        return cast(Tensor, output.view(*x.shape[:-1], output.shape[-1]))

    def _weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the base layer's weight in a dtype; a copy is kept until the weight changes.

        Autocast would make a copy in each forward, and keep it until the backward pass is over.
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

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Let PEFT add the adapter to the base weight, whose version does not show it."""
        self.forget()
        PeftLinear.merge(self._module, *args, **kwargs)

    def close(self) -> None:
        """Give this layer, and all others of its owner, PEFT's forward back."""
        self._owner.close()

    def forget(self) -> None:
        """Free the copy of the weight."""
        self._weight, self._weight_of = None, ()


class FusedLora:
    """Fused forwards in the place of those of a model's LoRA layers, until `close`.

    A `FusedLora` that is there already is closed. PEFT's own forward still computes every call that
    cannot be fused: quantized bases, DoRA, several active adapters, inference, `torch.compile`.

    Under autocast each layer keeps a copy of its frozen weight in the lower precision. Edits of
    that weight through `weight.data` are not seen then, except those of PEFT's `merge`.

    Example:
        >>> fused = FusedLora(model)
        >>> ...  # train
        >>> fused.close()
    """

    def __init__(self, model: nn.Module) -> None:
        """Put the fused forwards in.

        Args:
            model: What is called with a batch; it holds PEFT LoRA layers.
        """
        close_fused(model)
        # Under FSDP2 a kept copy would be of the whole weight, of which a process holds a part.
        self.keeps_copies = not any(hasattr(module, "unshard") for module in model.modules())
        """Whether layers keep their weight in the dtype of autocast from step to step."""
        self._modules = {n: module for n, module in model.named_modules() if _is_plain(module)}
        self._layers = [_FusedLayer(module, self) for module in self._modules.values()]
        self.open()

    @property
    def layers(self) -> list[str]:
        """Names of the modules that are fused."""
        return list(self._modules)

    def open(self) -> None:
        """Put the fused forwards in, unless they are."""
        for module, layer in zip(self._modules.values(), self._layers, strict=True):
            vars(module).update(forward=layer, merge=layer.merge)

    def close(self) -> None:
        """Give every layer PEFT's forward back."""
        for module, layer in zip(self._modules.values(), self._layers, strict=True):
            if vars(module).get("forward") is layer:
                del module.forward, module.merge
            layer.forget()


def close_fused(model: nn.Module) -> None:
    """Close the `FusedLora` of a model, if there is one: who held it may be gone without that."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _FusedLayer):
            forward.close()


def _is_watched(module: nn.Module) -> bool:
    """Return whether somebody has put hooks, or a forward of its own, on a module."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or "forward" in vars(module)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is PEFT's LoRA on a plain linear layer, whose forward is its own."""
    return (
        type(module) is PeftLinear
        and type(module.base_layer) is nn.Linear
        and type(module.base_layer.weight) is nn.Parameter
        and not module.lora_variant
        and "forward" not in vars(module)
    )
