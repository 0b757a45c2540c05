"""Hooks that observe attention through transformers' `AttentionInterface`.

An attention module reads an implementation's name from its configuration, and finds the function by
this name in the interface. In training forwards the hooks substitute a name of ours. Our function
calls the original one on the same tensors, then recomputes the logits for the sink. All other
forwards are unchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.attention_blocks import AttentionBlock, find_blocks
from dynlora.adapters.attention_rows import attention_rows
from dynlora.adapters.layers import LoraView
from dynlora.adapters.own_hook import OwnHook


@runtime_checkable
class AttentionSink(Protocol):
    """Receiver of attention logits."""

    def attend(self, names: Sequence[str], logits: Tensor, visible: Tensor) -> None:
        """Receive the attention logits of some tokens of one block, and their visible keys."""
        ...


class AttentionTaps:
    """Hooks on the model and on the attention module of every block with LoRA layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LoraView],
        sink: AttentionSink,
        *,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Find the attention of each block; `open` installs the hooks.

        Args:
            model: Model called with each batch.
            layers: The LoRA layers.
            sink: Receiver of the logits.
            timed: Context manager that measures the time spent in it.

        Raises:
            ConfigError: If no block with LoRA layers has attention that can be recomputed.
        """
        self._model = model
        self._sink = sink
        self._timed = timed
        self._blocks = find_blocks(model, layers)
        self._name = f"dynlora_{id(self)}"
        self._armed = False
        self._seen: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        """Install the hooks, unless installed."""
        if self._handles:
            return
        self._handles = [self._model.register_forward_pre_hook(OwnHook(self._on_model))]
        for block in self._blocks:
            arm, restore = OwnHook(self._before(block)), OwnHook(self._after(block))
            before = block.module.register_forward_pre_hook(arm)
            after = block.module.register_forward_hook(restore, always_call=True)
            self._handles += [before, after]

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_model(self, model: nn.Module, _args: Any) -> None:
        self._armed = model.training and torch.is_grad_enabled()
        self._seen = set()

    def _before(self, block: AttentionBlock) -> Callable[[nn.Module, Any], None]:
        def arm(module: Any, _args: Any) -> None:
            # Skip repeats by gradient checkpointing, and reference passes without the adapter.
            if self._armed and id(module) not in self._seen and block.layers[0].is_active:
                self._seen.add(id(module))
                block.interface[self._name] = self._attend
                module.config = _Renamed(block.config, self._name)

        return arm

    def _after(self, block: AttentionBlock) -> Callable[..., None]:
        def restore(module: Any, *_: Any) -> None:
            if block.interface.pop(self._name, None) is not None:
                module.config = block.config

        return restore

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Any:
        """Call the module's own attention function, and pass its logits to the sink."""
        block = next(block for block in self._blocks if block.module is module)
        result = block.original(module, query, key, value, attention_mask, **options)
        # Autocast would round the float32 logits.
        exactly = torch.autocast(query.device.type, enabled=False)
        with torch.no_grad(), exactly, self._timed():
            causal = block.implementation == "sdpa" and _is_causal(module, options)
            names = [layer.name for layer in block.layers]
            for logits, visible in attention_rows(
                query, key, attention_mask, causal=causal, options=options
            ):
                self._sink.attend(names, logits, visible)
        return result


class _Renamed:
    """A configuration with another name of the attention implementation."""

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._attn_implementation = name

    def __getattr__(self, key: str) -> Any:
        return getattr(self._config, key)


def _is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Return whether PyTorch's attention hides later keys without a mask."""
    given = options.get("is_causal")
    return bool(vars(module).get("is_causal", True) if given is None else given)
