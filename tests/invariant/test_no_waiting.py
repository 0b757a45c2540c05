"""A step between events asks the device for nothing: who reads a value back waits for all of it."""

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dynlora.config import METRICS
from tests.models import adamw, attached, lora_llama, loss_of, sequences

READS = {
    "__bool__", "__float__", "__index__", "__int__", "allclose", "as_tensor", "cpu", "equal",
    "item", "new_tensor", "numpy", "tensor", "tolist",
}  # fmt: skip
"""Functions that bring values to the host, or from there."""

SIZED_BY_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operations whose output has a shape, or is a number, that the host must wait for."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Let tensors seem to be elsewhere: a CPU may be asked what it has at hand."""
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)


def caller():
    """Return the module, outside of torch and of this one, that is about to call torch."""
    frame = sys._getframe(2)
    while (name := frame.f_globals["__name__"]) == __name__ or name.split(".")[0] == "torch":
        frame = frame.f_back
    return name


class ReadBack(TorchFunctionMode):
    """Notes what of dynlora calls a tensor's methods that read it."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        reads = name in READS or (name == "to" and args[1:2] == ("cpu",))
        if reads and (module := caller()).startswith("dynlora"):
            self.found.add((module, name))
        return func(*args, **(kwargs or {}))


class ReadInside(TorchDispatchMode):
    """Notes what of dynlora calls operations that read a tensor to know what they return."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            item is not None and item.dtype == torch.bool
            for argument in args
            if isinstance(argument, (list, tuple))
            for item in argument
        )
        if (name in SIZED_BY_VALUES or by_mask) and (module := caller()).startswith("dynlora"):
            self.found.add((module, name))
        return func(*args, **(kwargs or {}))


def read_by_step(steps, *, total_steps=400, spoil=lambda step, dynamic: None, **config):
    """Train, and return what dynlora reads back in each step.

    `spoil` is called between the backward pass and `observe`.
    """
    model = lora_llama().train()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=total_steps, **config)
    batches, found = sequences(), []
    for step in range(steps):
        reading = ReadBack()
        with reading, ReadInside(reading.found):
            loss_of(model, next(batches)).backward()
        spoil(step, dynamic)
        with reading, ReadInside(reading.found):
            dynamic.observe()
        optimizer.step()
        with reading, ReadInside(reading.found):
            dynamic.step()
        optimizer.zero_grad()
        found.append(reading.found)
    return found


@pytest.mark.parametrize("importance", [name for name in METRICS if name != "attention_entropy"])
def test_before_an_event_nothing_is_read_back_by_any_metric_of_gradients(importance):
    assert read_by_step(10, importance=importance) == [set()] * 10


def test_who_looks_at_attention_reads_where_padding_ends_in_sampled_steps_alone():
    found = read_by_step(20, importance="attention_entropy")
    assert [step for step, read in enumerate(found) if read] == [0, 8, 16]
    assert found[0] == {("dynlora.adapters.attention", "nonzero")}


def test_layers_that_are_missing_or_broken_now_and_then_are_no_reason_to_read():
    def spoil(step, dynamic):
        missing, broken = dynamic._layers[step % 3], dynamic._layers[3 + step % 2]
        missing.lora_A.grad = missing.lora_B.grad = None
        broken.lora_B.grad[0, 0] = float("nan")

    assert read_by_step(12, spoil=spoil) == [set()] * 12


def test_only_the_step_of_an_event_reads():
    found = read_by_step(14, total_steps=100, first_event=0.1, last_event=0.1)
    assert [step for step, read in enumerate(found, 1) if read] == [10]
    modules = {module for module, _ in found[9]}
    assert {"dynlora.importance.agreement", "dynlora.features"} <= modules


def test_stopping_at_a_gradient_that_is_not_finite_reads_in_every_step():
    assert all(read_by_step(4, on_nonfinite="stop"))
