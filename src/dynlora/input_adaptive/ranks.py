"""Input-adaptive ranks: each example's complexity determines how many components it uses.

A hook behind each `lora_A` masks all but the first components, by the quarter of the complexity.
Only events order components and set thresholds: forwards between optimizer steps must agree.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.extension import Host
from dynlora.adapters.layers import LoraView, find_lora_layers, find_root
from dynlora.engines.checks import check_engine
from dynlora.engines.compiled import is_compiled
from dynlora.errors import EngineError, LayerError
from dynlora.input_adaptive.complexity import (
    FRACTIONS,
    ComplexitySample,
    ComponentMask,
    quarter_of,
)
from dynlora.input_adaptive.reader import ComplexityReader, Reading, sampling_keys


class InputAdaptiveRanks:
    """Masks by which each example uses only part of a layer's components, by its complexity.

    Examples:
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
            thresholds: Quartiles of the complexity; if empty, every component is used.
            timed: Context manager that measures the time spent in it.

        Raises:
            EngineError: If the model runs under an engine that bypasses hooks.
            LayerError: If input-adaptive ranks do not support the model or one of its LoRA layers.
        """
        check_engine(model)
        if is_compiled(model):
            raise EngineError(
                "Input-adaptive ranks must run without torch.compile, because their hooks break "
                f"its graphs into many, got a compiled {type(model).__name__}: do not compile it."
            )
        self._reader = ComplexityReader(find_root(model)[0])
        self._layers = find_lora_layers(model, adapter_name)
        for layer in self._layers:
            # A hook masks only components that PEFT computes by a module, once per forward.
            masked = isinstance(layer.factor_A.holder, nn.Linear | nn.Conv2d)
            if not masked or not layer.has_tokens or layer.module.lora_variant:
                raise LayerError(
                    "Input-adaptive ranks need LoRA, not DoRA, on linear layers and convolutions, "
                    f"got {layer.name!r} on a {type(layer.module.get_base_layer()).__name__}: "
                    "leave it out of `target_modules`, or set `input_adaptive=False`."
                )
        self.thresholds = thresholds
        """Complexities that separate the quarters; the controller changes them only at events."""
        self.sample = ComplexitySample()
        self.observing = False
        """Whether training forwards are sampled."""
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
        """Keep the masking in copies of the model, without the trainer's timer and sampling."""
        return vars(self) | {"_timed": nullcontext, "_reading": None, "observing": False}

    @property
    def whole(self) -> bool:
        """Whether complexity is per whole example; otherwise per prefix."""
        return self._reader.whole

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Use every component for all examples, as the saved adapter does without dynlora."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def fractions(self, *args: Any, **kwargs: Any) -> Float[Tensor, "..."]:
        """Return the fraction of a layer's components that each example, or token, uses.

        Args:
            *args: Positional arguments of a call of the base model.
            **kwargs: Its keyword arguments.

        Raises:
            EngineError: If the call continues an unknown or changed cache.
            LayerError: If the input cannot be read.
        """
        reading = self._reader.read(self._reader.model, args, kwargs)
        quarter = quarter_of(reading.complexity, self.thresholds)
        return torch.tensor(FRACTIONS, device=quarter.device)[quarter]

    @classmethod
    def of_controller(cls, host: Host) -> "InputAdaptiveRanks":
        """Return the masks of a controller's adapter, for `DynamicLoraConfig.input_adaptive`."""
        return cls(host.model, adapter_name=host.layers[0].adapter, timed=host.timed)

    @staticmethod
    def remove(layers: Sequence[LoraView]) -> bool:
        """Remove the masks of earlier runs from these layers; return whether there were any.

        A notebook cell that runs twice loads them twice; a copied model has them without an owner.
        """
        hooks = [hook for layer in layers for hook in layer.factor_A.holder._forward_hooks.values()]
        owners = [
            getattr(hook.func, "__self__", None) for hook in hooks if isinstance(hook, partial)
        ]
        found = [owner for owner in owners if isinstance(owner, InputAdaptiveRanks)]
        for owner in found:
            owner.close()
        return bool(found)

    def attach(self, host: Host) -> None:
        """Install the hooks, and sample complexities from now on."""
        self.open()
        self.observing = True

    def begin_step(self, step: int, *, sampled: bool = True) -> None:
        """Set the step for sampling keys, and restart the count of training forwards."""
        self._step = step
        self._forwards = 0

    def after_event(self, order: Callable[[], None]) -> None:
        """Order the components, and compute the thresholds from the sample."""
        order()
        self.thresholds = self.sample.thresholds()

    def freeze(self) -> None:
        """Keep the thresholds from now on."""
        self.observing = False

    def open(self) -> None:
        """Install the hooks, unless installed."""
        if self._handles:
            return
        self.remove(self._layers)
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
        """Remove the hooks, so that every example uses every component."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sample and the thresholds as tensors."""
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        return {**self.sample.state_dict(), "thresholds": thresholds}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self.sample.load_state_dict(state)
        self.thresholds = tuple(state["thresholds"].tolist())

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._reader.model and self._outermost is not None:
            return  # the model passes its arguments to its backbone
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
        failed = output is None  # some layers' caches may be incomplete
        if self._reading is not None and not self.whole and not failed:
            self._reader.remember(self._reading, output)
        self._outermost = self._reading = self._mask = None

    def _limit(
        self, layer: LoraView, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        mask = self._replay(layer) if self._mask is None else self._mask
        return output if mask.quarter is None else output * mask.of(layer, output)

    def _replay(self, layer: LoraView) -> ComponentMask:
        """Return the mask of the only training forward, which gradient checkpointing repeats."""
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
