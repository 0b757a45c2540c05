"""Taps that show what attention looks at, through transformers' own `AttentionInterface`.

Every attention module of transformers asks its configuration for the name of an implementation and
the interface for the function behind it. In forwards that train a module finds a name of ours
there: behind it, the function that it would have found is called first, on the same tensors;
then what it looked at is worked out again and shown. In all other forwards nothing is different.
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
    """What the taps show attention to."""

    def attend(self, names: Sequence[str], logits: Tensor, visible: Tensor) -> None:
        """Take the attention logits of some tokens of one block, and which keys they may see."""
        ...


class AttentionTaps:
    """Hooks on the model and on the attention module of every block that holds LoRA layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LoraView],
        sink: AttentionSink,
        *,
        timed: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Find the attention of each block; nothing is installed yet.

        Args:
            model: What is called with a batch.
            layers: The LoRA layers.
            sink: Takes the attention.
            timed: Context manager that books the time spent in it.

        Raises:
            ConfigError: If the attention of no block with LoRA layers can be reached.
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
        """Install the hooks, unless they are."""
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
            # Gradient checkpointing runs a forward twice: the first is shown. In a reference pass
            # the adapter is off.
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
        """Do what the module's own implementation does, and show what it looked at."""
        block = next(block for block in self._blocks if block.module is module)
        result = block.original(module, query, key, value, attention_mask, **options)
        # Autocast would round again what is worked out in float32.
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
    """A configuration with another name for the implementation of attention."""

    def __init__(self, config: Any, name: str) -> None:
        self._config = config
        self._attn_implementation = name

    def __getattr__(self, key: str) -> Any:
        return getattr(self._config, key)


def _is_causal(module: nn.Module, options: Mapping[str, Any]) -> bool:
    """Return whether PyTorch's attention hides later keys where it gets no mask."""
    given = options.get("is_causal")
    return bool(vars(module).get("is_causal", True) if given is None else given)
