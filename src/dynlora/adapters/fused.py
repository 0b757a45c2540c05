"""Fused forward and backward of LoRA layers: one autograd function for all that read one input.

PEFT runs a layer as a chain of small operations, each of which reads and writes tensors as large
as the layer's output, and autograd adds up what each of the layers sends back to their common
input. Here the adapters of query, key and value, or of gate and up, are one product, everything is
added in place, and between forward and backward no more is kept than the input and a rank's worth.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.fused_linear import FusedLinear
from dynlora.adapters.sharding import is_sharded

LEAST_ELEMENTS = 2**18
"""Elements of a layer's input and output together from which on a fused call is the faster one, on
a CPU; measured with widths of 64 to 768 and ranks of 8 and 32."""


class _Group:
    """Layers that read one tensor, and the outputs that some of them have not asked for yet."""

    def __init__(self, members: list["_FusedLayer"]) -> None:
        self.members = members
        self._inputs: Tensor | None = None
        self._version = 0
        self._waiting: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forget outputs that nobody has asked for."""
        self._inputs, self._waiting = None, {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave outputs out of copies: they are of the original's forward."""
        return {"members": self.members, "_inputs": None, "_version": 0, "_waiting": {}}

    def holds(self, name: str, inputs: Tensor) -> bool:
        """Return whether a layer's output of this very input is there."""
        same = self._inputs is inputs and self._version == inputs._version
        return same and name in self._waiting

    def fill(self, inputs: Tensor, outputs: dict[str, Tensor]) -> None:
        """Keep outputs until they are asked for, or the next are there."""
        self._inputs, self._version, self._waiting = inputs, inputs._version, outputs

    def take(self, name: str) -> Tensor:
        """Hand out a layer's output, once."""
        output = self._waiting.pop(name)
        if not self._waiting:
            self._inputs = None
        return output


class _FusedLayer:
    """The forward of one layer, in the place of PEFT's."""

    def __init__(self, name: str, module: PeftLinear, owner: "FusedLora") -> None:
        self.name = name
        self.group = _Group([self])
        self._module = module
        self._base = cast(nn.Linear, module.base_layer)
        self._owner = owner
        self._weight: Tensor | None = None
        self._weight_of: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the copy of the weight out of copies of the model."""
        return vars(self) | {"_weight": None, "_weight_of": ()}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or torch.compiler.is_compiling():
            return self._original(x, *args, **kwargs)
        if self.group.holds(self.name, x):
            return self._owner.watched(self.group.take(self.name))
        pays = self.pays(x)
        if (not pays and self._owner.settled) or not self.fits(x):
            return self._original(x)
        if self.drops:
            return _run([self], x, self._dropout(x))[self.name] if pays else self._original(x)
        self._owner.note(self.name, x)
        if not pays:
            return self._owner.watched(self._original(x))
        able = [m for m in self.group.members if m is self or m.joins(x)]
        self.group.fill(x, _run(able, x, None))
        return self._owner.watched(self.group.take(self.name))

    def _original(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # No bound method is kept: a pickle would look it up on the module, and find this object.
        return cast(Tensor, PeftLinear.forward(self._module, x, *args, **kwargs))

    def joins(self, x: Tensor) -> bool:
        """Return whether this layer's output can be computed together with another's."""
        return self.fits(x) and not self.drops and self.pays(x)

    def pays(self, x: Tensor) -> bool:
        """Return whether fusing saves more than the call of a function written in Python costs."""
        rows = x.numel() // max(x.shape[-1], 1)
        return x.device.type != "cpu" or rows * sum(self._base.weight.shape) >= LEAST_ELEMENTS

    @property
    def drops(self) -> bool:
        """Whether dropout changes what the adapter reads."""
        dropout = self._dropout
        return not isinstance(dropout, nn.Identity) and dropout.training

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The live components of `lora_A` and `lora_B`."""
        module, adapter = self._module, self._adapter
        lora_A, lora_B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        rank = module.r[adapter]
        if len(lora_A) == rank:
            return lora_A, lora_B
        return lora_A[:rank], lora_B[:, :rank]  # held wider, see `static`

    @property
    def scaling(self) -> float:
        """Factor on what the adapter adds."""
        return float(self._module.scaling[self._adapter])

    @property
    def bias(self) -> Tensor | None:
        """Of the base layer."""
        return cast(Tensor | None, self._base.bias)

    def fits(self, x: Tensor) -> bool:
        """Return whether a forward with this input can be fused: PEFT's own does all others."""
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

    def weight(self, dtype: torch.dtype) -> Tensor:
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
        """Let PEFT add the adapter to the base weight, behind torch's back: no version tells it."""
        self.forget()
        PeftLinear.merge(self._module, *args, **kwargs)

    def close(self) -> None:
        """Give this layer, and all others of its owner, PEFT's forward back."""
        self._owner.close()

    def forget(self) -> None:
        """Free the copy of the weight."""
        self._weight, self._weight_of = None, ()

    @property
    def _adapter(self) -> str:
        return str(self._module.active_adapters[0])

    @property
    def _dropout(self) -> nn.Module:
        return cast(nn.Module, self._module.lora_dropout[self._adapter])


def _run(layers: Sequence[_FusedLayer], x: Tensor, dropped: Tensor | None) -> dict[str, Tensor]:
    """Return the output of each layer by its name."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else x.dtype
    factors = [layer.factors for layer in layers]
    with torch.autocast(device, enabled=False) if casts else nullcontext():
        outputs = FusedLinear.apply(  # type: ignore[no-untyped-call]
            x,
            dropped,
            [layer.weight(dtype) for layer in layers],
            [None if layer.bias is None else layer.bias.to(dtype) for layer in layers],
            [layer.scaling for layer in layers],
            *(lora_A for lora_A, _ in factors),
            *(lora_B for _, lora_B in factors),
        )
    # Not in there: what a function returns as a view must not be changed in place.
    shaped = [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]
    return {layer.name: output for layer, output in zip(layers, shaped, strict=True)}


class FusedLora:
    """Fused forwards in the place of those of a model's LoRA layers, until `close`.

    A `FusedLora` that is there already is closed.

    Layers that cannot be fused, and calls that cannot, go on as PEFT's own: quantized bases, DoRA,
    several active adapters, inference, `torch.compile`.

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
        self._layers = {
            name: _FusedLayer(name, module, self)
            for name, module in model.named_modules()
            if _is_plain(module)
        }
        self._model = model
        # Under FSDP2 a kept copy would be of the whole weight, of which a process holds a part.
        self.keeps_copies = not any(hasattr(module, "unshard") for module in model.modules())
        """Whether layers keep their weight in the dtype of autocast from step to step."""
        self._modules = {name: model.get_submodule(name) for name in self._layers}
        self._handle: RemovableHandle | None = None
        self._groups: list[_Group] = []
        self._arrived = False
        self.settled = False
        """Whether it is known which layers read one tensor."""
        self._last: weakref.ref[Tensor] | None = None
        self._found: list[list[str]] | None = None
        self._seen: set[str] = set()
        self.open()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what no pickle can hold: the tensor that was read last."""
        return vars(self) | {"_last": None}

    @property
    def layers(self) -> list[str]:
        """Names of the modules that are fused."""
        return list(self._layers)

    def open(self) -> None:
        """Put the fused forwards in, unless they are."""
        if self._handle is not None:
            return
        for name, layer in self._layers.items():
            vars(self._modules[name]).update(forward=layer, merge=layer.merge)
        self._handle = self._model.register_forward_pre_hook(self._begin)

    def close(self) -> None:
        """Give every layer PEFT's forward back."""
        if self._handle is None:
            return
        for module in self._modules.values():
            vars(module).pop("forward", None)
            vars(module).pop("merge", None)
        for layer in self._layers.values():
            layer.forget()
        for group in self._groups:
            group.clear()
        self._handle.remove()
        self._handle = None

    @property
    def groups(self) -> list[list[str]] | None:
        """Names of the layers that are computed together; None before a first forward shows them.

        They are used from the forward on that comes after its backward pass.
        """
        if self._found is None:
            return None
        return [names for names in self._found if len(names) > 1]

    def load_groups(self, groups: list[list[str]] | None) -> None:
        """Take over `groups` of an earlier run: sums are then rounded as they were there.

        Unless that run had fused layers which this one has not, held or named in another way: then
        groups are found anew.
        """
        if not {name for names in groups or [] for name in names} <= self._layers.keys():
            groups = None
        self._found, self.settled, self._seen = groups, groups is not None, set()
        self._use(groups or [])

    def _use(self, groups: list[list[str]]) -> None:
        for layer in self._layers.values():
            layer.group = _Group([layer])
        self._groups = [_Group([self._layers[name] for name in names]) for names in groups]
        for group in self._groups:
            for layer in group.members:
                layer.group = group

    def note(self, name: str, x: Tensor) -> None:
        """Find, in the first forward, which layers read one tensor, one right after another."""
        if self.settled or name in self._seen:
            return
        self._seen.add(name)
        if self._found is None or self._last is None or self._last() is not x:
            self._found = [*(self._found or []), []]
        self._found[-1].append(name)
        self._last = weakref.ref(x)

    def watched(self, output: Tensor) -> Tensor:
        """Return a layer's output, whose gradient will tell that a backward pass has begun."""
        if not self.settled and output.requires_grad:
            output.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        return output

    def _on_gradient(self, _: Tensor) -> None:
        self._arrived = True

    def _begin(self, *_: Any) -> None:
        """Forget the last forward, and use what was found once a backward pass is over.

        Not earlier: gradient checkpointing runs forwards again in their backward pass, and must
        find every layer as it was.
        """
        if torch.compiler.is_compiling():
            return
        for group in self._groups:
            group.clear()
        if self._found is not None and self._arrived and not self.settled:
            self.settled, self._last = True, None
            self._use(self.groups or [])


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
