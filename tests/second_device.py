"""A second device on a machine with one: tensors that claim to be on `meta`, but have values."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

SECOND = torch.device("meta")


class _OnSecond(Tensor):
    """A tensor of the second device around one of the CPU."""

    cpu_values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "_OnSecond":
        made = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=SECOND,
        )
        made.cpu_values = values
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)
        self.cpu_values = new.cpu_values

    def data_ptr(self) -> int:
        return self.cpu_values.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Within the context, `meta` is a device with values, which no operation mixes with others.

    As on a GPU, numbers without dimensions may be of the CPU, and copies cross devices.
    """

    def __torch_dispatch__(self, op: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
    second = [isinstance(tensor, _OnSecond) for tensor in tensors]
    copies = op.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
    if any(second) and not copies:
        for tensor, there in zip(tensors, second, strict=True):
            if not there and tensor.dim():
                raise RuntimeError(f"{op} got tensors on the CPU and on the second device")
    target = kwargs.get("device")
    there = any(second) if target is None else torch.device(target) == SECOND
    if there and target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(
        _OnSecond, lambda tensor: tensor.cpu_values, (args, dict(kwargs))
    )
    found = op(*plain_args, **plain_kwargs)
    if there and not (op.overloadpacket == torch.ops.aten.copy_ and not second[0]):
        found = tree_map_only(Tensor, _OnSecond, found)
    return return_and_correct_aliasing(op, args, kwargs, found) if any(second) else found
