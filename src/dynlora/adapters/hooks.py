"""Hooks that pass the inputs and outputs of each LoRA layer to the input feature analyzer.

They return at once under `no_grad` and in eval mode, and never change a tensor.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.kinds import Rows
from dynlora.adapters.layers import LoraView
from dynlora.adapters.owners import OwnHook
from dynlora.engines.compiled import EagerSteps, only_eager
from dynlora.types import UNUSED_KEY

_MAIN_INPUTS = (
    "input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "sample",
    "hidden_states",
)  # fmt: skip
"""Names of the main input in models of transformers, text first, and of diffusers."""
_MIX = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""The three odd constants of splitmix64 (Steele, Lea and Flood 2014), as signed integers."""


@runtime_checkable
class ActivationSink(Protocol):
    """Receiver of activations."""

    def observe(
        self, name: str, keys: Tensor, read: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        """Receive one sampling key per token of a layer's forward, and a function to read them."""


class ActivationTaps:
    """Forward hooks on the model and its LoRA layers; a compiled model runs eagerly under them."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LoraView],
        sink: ActivationSink,
        *,
        compiled: bool = False,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Prepare the hooks; `open` installs them, and `timed` measures their time."""
        self._step = 0
        self._compiled = compiled
        self._called = False  # whether a layer's hook ran since they were installed
        self._eager = EagerSteps()
        self._model = model
        self._layers = layers
        self._sink = sink
        self._timed = timed
        self._examples: Int[Tensor, " batch"] | None = None
        self._positions: dict[int, Int[Tensor, "batch length"]] = {}
        """Token positions by length, of the input and the decoder's targets; -1 is padding."""
        self._keys: dict[tuple[int, int, int], Tensor] = {}
        self._uses: Counter[str] = Counter()
        self._later: Counter[str] = Counter()
        """Uses without gradients, which reentrant checkpointing repeats in the backward pass."""
        self._ended = False  # whether the model's last forward with gradients ended
        self._handles: list[RemovableHandle] = []

    def open(self, step: int = 0) -> None:
        """Install the hooks, unless installed; `step`, of the optimizer, enters the keys."""
        self._step = step
        if self._compiled:
            self._eager.open()
        if self._handles:
            return
        self._called = False
        before = OwnHook(only_eager(self._on_model))
        after = OwnHook(only_eager(self._after_model))
        self._handles = [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after),
        ]
        for layer in self._layers:
            hook = OwnHook(only_eager(self._layer_hook(layer)))
            self._handles.append(layer.module.register_forward_hook(hook))

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._eager.close()

    def after_backward(self) -> None:
        """Notice from hooks that did not run that the model was compiled after `DynamicLora`."""
        self._compiled |= bool(self._handles) and not self._called

    def _on_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return  # as of a reference, between a forward and its backward pass
        self._examples = None
        if not model.training:
            return
        kwargs = _named_in_mappings(args, kwargs) | kwargs
        inputs = _first_tensor(args, kwargs)
        if inputs is None or inputs.numel() == 0:
            return
        named = _by_name(model, args, kwargs)
        home = self._layers[0].factor_A.home
        masks = [mask for mask in (_said(named), _read(inputs, named)) if len(mask) == len(inputs)]
        self._positions = {mask.shape[1]: _positions(mask.to(device=home)) for mask in masks}
        positions = self._positions[inputs.shape[1]]
        self._examples = example_keys(inputs.to(device=home), positions, self._step)
        self._keys = {}
        self._uses, self._later = Counter(), Counter()
        self._ended = False

    def _after_model(self, *_: Any) -> None:
        self._ended = True

    def _layer_hook(self, layer: LoraView) -> Any:
        name = layer.name

        def show(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._called = True
            if self._examples is None or not self._is_shown(name):
                return
            use = self._uses[name]
            self._uses[name] += 1
            if not layer.has_tokens or not layer.is_active:  # or a pass without this adapter
                return
            rows = layer.rows(args[0], output)
            keys = self._token_keys(rows.shape, use)
            if keys is not None:
                with torch.no_grad(), self._timed():
                    read = partial(_read_rows, rows, output.device)
                    self._sink.observe(name, keys, read)

        return show

    def _is_shown(self, name: str) -> bool:
        """Return whether this is the first forward with gradients of one of a layer's uses.

        Gradient checkpointing repeats forwards in the backward pass. In reentrant mode, the first
        one has no gradients. Repeats of a forward before the model's last one are not shown.
        """
        if not torch.is_grad_enabled():
            self._later[name] += not self._ended
            return False
        if not self._ended:
            return True
        self._later[name] -= 1
        return self._later[name] >= 0

    def _token_keys(self, rows: tuple[int, ...], use: int) -> Int[Tensor, " tokens"] | None:
        """Return one key per row of the layer's input; None if rows do not fit the batch.

        A leading 1, as in position ids, stands for every example. `use` counts earlier runs of the
        layer in this forward.
        """
        assert self._examples is not None
        batch = len(self._examples)
        if not rows or (rows[0] != 1 and rows[0] % batch):
            return None
        shape = (batch, math.prod(rows) if rows[0] == 1 else math.prod(rows) // batch)
        if (*shape, use) not in self._keys:
            # In pooled or patched inputs, every row of an example counts.
            every = torch.arange(shape[1], device=self._examples.device).expand(shape)
            positions = self._positions.get(shape[1], every)
            examples = mix(self._examples + use) if use else self._examples
            keys = mix(examples[:, None] + positions) & UNUSED_KEY
            self._keys[*shape, use] = torch.where(positions >= 0, keys, UNUSED_KEY).flatten()
        return self._keys[*shape, use]


def _read_rows(rows: Rows, device: torch.device, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and outputs on the index's device, of rows on another."""
    # Rows shared by all examples are stored once, and count for each.
    inputs, outputs = rows.read((index % math.prod(rows.shape)).to(device))
    return inputs.to(index.device), outputs.to(index.device)


def _named_in_mappings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of arguments that are whole batches, as in Sentence Transformers."""
    batches = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping)]
    return {str(name): value for batch in batches for name, value in batch.items()}


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by their names in `forward`; a PEFT model's `forward` may have none."""
    for module in (model, model.get_base_model() if isinstance(model, PeftModel) else model):
        given = inspect.signature(module.forward).parameters.values()
        names = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
        if names:
            return dict(zip(names, args, strict=False)) | kwargs
    return kwargs


def _read(inputs: Tensor, named: Mapping[str, Any]) -> Tensor:
    """Return the mask of the tokens that a model reads, 0 for padding."""
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == inputs.shape[:2]:
        return mask
    return torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)


def _said(named: Mapping[str, Any]) -> Tensor:
    """Return the mask of a decoder's target tokens, 0 for padding; empty if unknown.

    If input and target have the same length, the input's mask applies to both.
    """
    mask, labels = named.get("decoder_attention_mask"), named.get("labels")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return labels != -100  # transformers' padding of labels
    return torch.empty(0, 0)


def _positions(mask: Tensor) -> Int[Tensor, "batch length"]:
    """Return each token's index among unmasked tokens, -1 if masked."""
    mask = mask.long()
    return torch.where(mask > 0, mask.cumsum(dim=1) - 1, -1)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the model's main input: the first tensor with at least two dimensions."""
    named = [kwargs[key] for key in _MAIN_INPUTS if key in kwargs]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value
    return None


def example_keys(inputs: Tensor, positions: Tensor, step: int) -> Int[Tensor, " batch"]:
    """Hash each example's unmasked content, independent of padding and batching."""
    values = inputs if not inputs.is_floating_point() else inputs.float().view(torch.int32)
    values = values.long()
    while values.dim() > 2:
        values = mix(values).sum(dim=-1)
    mixed = mix(values + mix(positions + 1))
    unmasked = torch.where(positions >= 0, mixed, 0)
    # Filled on the device, because a copy would synchronize with it.
    return mix(unmasked.sum(dim=1) + mix(torch.full((), step, device=inputs.device)))


def mix(values: Tensor) -> Tensor:
    """Apply splitmix64's output function to each value; integer overflow wraps as intended."""
    z = values + _MIX[0]
    z = (z ^ (z >> 30)) * _MIX[1]
    z = (z ^ (z >> 27)) * _MIX[2]
    return z ^ (z >> 31)
