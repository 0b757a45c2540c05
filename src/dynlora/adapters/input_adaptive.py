"""Input-adaptive ranks: how varied an example is decides how many of a layer's components it uses.

A hook on the model finds the quarter of the running distribution that the complexity of a call's
examples is in; a hook behind each `lora_A` multiplies all components but the first k of that
quarter by 0. Components are ordered by strength when ranks move. Thresholds do not change between
two steps of the optimizer, so that every forward between them agrees.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.complexity_reader import ComplexityReader, Reading, sampling_keys
from dynlora.adapters.component_mask import ComponentMask, check_kind
from dynlora.adapters.engine import check_engine, check_not_compiled
from dynlora.adapters.layers import LoraView, find_lora_layers, find_root
from dynlora.complexity import FRACTIONS, ComplexitySample, quarter_of
from dynlora.errors import EngineError


class InputAdaptiveRanks:
    """The hooks, the thresholds and, while it trains, the sample that thresholds are taken from.

    Example:
        >>> adaptive = load_input_adaptive(model, "adapter")
        >>> with adaptive.disabled():
        ...     model(**batch)  # with every component of the adapter
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        adapter_name: str | None = None,
        thresholds: tuple[float, ...] = (),
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Install the hooks.

        Args:
            model: The PEFT model.
            adapter_name: The adapter; None for the active one.
            thresholds: Quartiles of the complexity; without them every component is used.
            timed: Context manager that books the time spent in it.

        Raises:
            EngineError: If the model runs under an engine that hooks do not reach.
            LayerError: If the model or one of its LoRA layers cannot have input-adaptive ranks.
        """
        check_engine(model)
        check_not_compiled(model)
        self._reader = ComplexityReader(find_root(model)[0])
        self._layers = find_lora_layers(model, adapter_name)
        for layer in self._layers:
            check_kind(layer)
        self.thresholds = thresholds
        """Complexities that part the quarters; the controller changes them at events only."""
        self.sample = ComplexitySample()
        """Complexities seen in training."""
        self.observing = False
        """Whether forwards that train are sampled."""
        self._timed = timed
        self._step = 0
        self._enabled = True
        self._outermost: nn.Module | None = None
        self._reading: Reading | None = None
        self._mask: ComponentMask | None = None
        self._training_mask: ComponentMask | None = None
        self._forwards = 0
        self._replayed = False
        self._handles: list[RemovableHandle] = []
        self.open()

    def __getstate__(self) -> dict[str, Any]:
        """Let a copy or a pickle of the model keep its function, and nothing of who trains it."""
        return vars(self) | {"_timed": nullcontext, "_reading": None, "observing": False}

    @property
    def whole(self) -> bool:
        """Whether complexity is that of the whole example; otherwise of each token's prefix."""
        return self._reader.whole

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let every example use every component, as the saved adapter does without dynlora."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def fractions(self, *args: Any, **kwargs: Any) -> Float[Tensor, "..."]:
        """Return the part of a layer's components that each example, or token, of a call uses.

        Args:
            *args: Of a call of the model, as the base model takes them.
            **kwargs: The same.

        Raises:
            EngineError: If the call goes on from a cache that is not known, or was changed.
            LayerError: If the input cannot be read.
        """
        reading = self._reader.read(self._reader.model, args, kwargs)
        quarter = quarter_of(reading.complexity, self.thresholds)
        return torch.tensor(FRACTIONS, device=quarter.device)[quarter]

    def begin_step(self, step: int) -> None:
        """Draw keys for the optimizer step after `step`."""
        self._step = step
        self._forwards = 0

    def update(self) -> None:
        """Take the thresholds from what was sampled so far."""
        self.thresholds = self.sample.thresholds()

    def open(self) -> None:
        """Install the hooks, unless they are."""
        if self._handles:
            return
        close_input_adaptive(self._layers)
        model = self._reader.model
        for module in {id(module): module for module in (model, model.base_model)}.values():
            self._handles += [
                module.register_forward_pre_hook(self._begin, with_kwargs=True),
                module.register_forward_hook(self._end, always_call=True),
            ]
        for layer in self._layers:
            hook = partial(self._limit, layer)
            self._handles.append(layer.factor_A.holder.register_forward_hook(hook))

    def close(self) -> None:
        """Remove the hooks: from here on every example uses every component."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sample and the thresholds as tensors."""
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        return {**self.sample.state_dict(), "thresholds": thresholds}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`'s output."""
        self.sample.load_state_dict(state)
        self.load_thresholds(state)

    def load_thresholds(self, state: Mapping[str, Tensor]) -> None:
        """Take over only the thresholds of `state_dict`'s output."""
        self.thresholds = tuple(state["thresholds"].tolist())

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._reader.model and self._outermost is not None:
            return  # the model hands its backbone what it was called with
        self._outermost, self._reading, self._mask = module, None, ComponentMask()
        trains = module.training and torch.is_grad_enabled()
        if self._enabled and (self.thresholds or (self.observing and trains)):
            with self._timed():
                self._reading = self._reader.read(module, args, kwargs)
                if self.observing and trains:
                    keys = sampling_keys(self._reading, self._step)
                    self.sample.observe(keys, self._reading.complexity.flatten())
                if self.thresholds:
                    self._mask = ComponentMask(
                        quarter=quarter_of(self._reading.complexity, self.thresholds),
                        rows=tuple(self._reading.mask.shape),
                    )
        if trains and self.thresholds:
            self._forwards = 1 if self._replayed else self._forwards + 1
            self._replayed = False
            self._training_mask = self._mask

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module is not self._outermost:
            return
        failed = output is None  # the cache may hold some of the call's tokens, in some layers
        if self._reading is not None and not self.whole and not failed:
            self._reader.remember(self._reading, output)
        self._outermost = self._reading = self._mask = None

    def _limit(
        self, layer: LoraView, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        mask = self._replay(layer) if self._mask is None else self._mask
        return output if mask.quarter is None else output * mask.of(layer, output)

    def _replay(self, layer: LoraView) -> ComponentMask:
        """Return the mask of the forward that gradient checkpointing runs again in backward.

        Raises:
            EngineError: If it could be any of several, or none.
        """
        if not self.thresholds:
            return ComponentMask()
        if self._training_mask is None or self._forwards != 1 or not torch.is_grad_enabled():
            raise EngineError(
                f"With input-adaptive ranks, LoRA layer {layer.name!r} must run within a call of "
                "the model, or be run again by gradient checkpointing in the backward pass of the "
                f"only forward of this micro-batch, got {self._forwards} forwards: run those "
                "that need no gradient under `torch.no_grad()`, or switch "
                "`gradient_checkpointing` off."
            )
        self._replayed = True
        return self._training_mask


def close_input_adaptive(layers: Sequence[LoraView]) -> bool:
    """Close what masks these layers' components, whoever has installed it; return whether any did.

    A cell that is run again loads it twice, and a copy of a model brings it along with nobody who
    could close it.
    """
    hooks = [hook for layer in layers for hook in layer.factor_A.holder._forward_hooks.values()]
    owners = [getattr(hook.func, "__self__", None) for hook in hooks if isinstance(hook, partial)]
    found = [owner for owner in owners if isinstance(owner, InputAdaptiveRanks)]
    for owner in found:
        owner.close()
    return bool(found)
