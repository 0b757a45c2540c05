"""Hooks that observe attention through transformers' `AttentionInterface`, a table by name.

In training they replace the named function by one that calls it, then recomputes the logits,
because fused attention never forms them.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.layers import LoraView, find_root
from dynlora.adapters.owners import OwnHook
from dynlora.engines.compiled import only_eager
from dynlora.errors import ConfigError

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Name of the interface in transformers' modeling files."""
EAGER = "eager_attention_forward"
"""Suffix of the name of the eager implementation in these files."""
QUERIES = 256
"""Most tokens per example whose attention is recomputed; they are evenly spaced."""


@runtime_checkable
class AttentionSink(Protocol):
    """Receiver of attention logits."""

    def attend(self, names: Sequence[str], logits: Tensor, visible: Tensor) -> None:
        """Receive the attention logits of some tokens of one block, and their visible keys."""


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
        """Find the attention of each block; `open` installs hooks, whose time `timed` measures."""
        self._model = model
        self._sink = sink
        self._timed = timed
        self._blocks = _find_blocks(model, layers)
        self._name = f"dynlora_{id(self)}"
        self._armed = False
        self._seen: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        """Install the hooks, unless installed."""
        if self._handles:
            return
        begin = OwnHook(only_eager(self._on_model))
        self._handles = [self._model.register_forward_pre_hook(begin)]
        for block in self._blocks:
            arm = OwnHook(only_eager(self._before(block)))
            restore = OwnHook(only_eager(self._after(block)))
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

    def _before(self, block: "_AttentionBlock") -> Callable[[nn.Module, Any], None]:
        def arm(module: Any, _args: Any) -> None:
            # Skip repeats by gradient checkpointing, and reference passes without the adapter.
            if self._armed and id(module) not in self._seen and block.layers[0].is_active:
                self._seen.add(id(module))
                block.interface[self._name] = self._attend
                module.config = _Renamed(block.config, self._name)

        return arm

    def _after(self, block: "_AttentionBlock") -> Callable[..., None]:
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
            home = block.layers[0].factor_A.home
            for logits, visible in attention_rows(
                query, key, attention_mask, causal=causal, options=options
            ):
                self._sink.attend(names, logits.to(device=home), visible.to(device=home))
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


@dataclass(frozen=True, slots=True)
class _AttentionBlock:
    """An attention module and the LoRA layers in its block."""

    module: Any
    config: Any
    interface: Any
    """The module's table of attention functions by name."""
    implementation: str
    original: Callable[..., Any]
    layers: Sequence[LoraView]


def _find_blocks(model: nn.Module, layers: Sequence[LoraView]) -> list["_AttentionBlock"]:
    """Find attention by its use of `AttentionInterface`: models name their modules differently."""
    root, _ = find_root(model)
    found = []
    for name, module in root.named_modules():
        code = inspect.unwrap(type(module).forward)
        if not inspect.isfunction(code) or INTERFACE not in code.__code__.co_names:
            continue
        held = [layer for layer in layers if layer.name.startswith(_block_of(name))]
        if held and "config" in vars(module):
            found.append(_make_block(module, code, held))
    config = vars(root).get("config")
    if not found or vars(config or root).get("is_encoder_decoder", False):
        raise ConfigError(
            "`importance: attention_entropy` needs blocks of self-attention that use transformers' "
            f"AttentionInterface, with LoRA layers in them, got a {type(root).__name__} "
            f"{'with an encoder and a decoder' if found else 'without such a block'}: use another "
            "metric, such as `signal`."
        )
    return found


def _make_block(module: Any, code: Any, layers: Sequence[LoraView]) -> _AttentionBlock:
    names, implementation = code.__globals__, module.config._attn_implementation
    interface = names[INTERFACE]
    eager = [name for name in code.__code__.co_names if name.endswith(EAGER)]
    if implementation == "eager" and eager:
        original = names[eager[0]]
    elif implementation == "sdpa":
        original = interface[implementation]
    else:
        raise ConfigError(
            "`importance: attention_entropy` needs attention that can be computed again, eager or "
            f"sdpa, got {implementation} in a {type(module).__name__}: load the model with "
            "`attn_implementation='sdpa'`, or use another metric."
        )
    return _AttentionBlock(module, module.config, interface, implementation, original, layers)


def _block_of(name: str) -> str:
    """Return the innermost numbered prefix, such as `encoder.layer.3.`, or else the parent's."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdecimal()]
    kept = parts[: numbered[-1] + 1] if numbered else parts[:-1]
    return "".join(f"{part}." for part in kept)


def attention_rows(
    query: Float[Tensor, "batch heads length d"],
    key: Float[Tensor, "batch key_heads keys d"],
    mask: Tensor | None,
    *,
    causal: bool,
    options: Mapping[str, Any],
) -> Iterator[tuple[Float[Tensor, "heads n keys"], Bool[Tensor, "any_heads n keys"]]]:
    """Yield logits and visible keys per example, for at most `QUERIES` of its unpadded tokens.

    Yields nothing if keys and queries differ in number. A batch without examples yields one empty
    result, because other processes wait for it. `mask` is True or 0 where a key is visible, or a
    bias.
    """
    length = query.shape[2]
    if key.shape[2] != length:
        return
    if len(query) == 0:
        none = query.new_zeros(query.shape[1], 0, length, dtype=torch.float32)
        yield none, none[:1].bool()
    scaling, softcap = options.get("scaling"), options.get("softcap")
    bias = options.get("position_bias")
    for place in range(len(query)):
        keys = key[place].repeat_interleave(query.shape[1] // key.shape[1], dim=0).float()
        visible, added = _split(_of(mask, place), length, causal=causal and mask is None)
        visible, added = visible.to(query.device), added.to(query.device)
        # A token that does not see itself is padding.
        real = visible.diagonal(dim1=-2, dim2=-1).all(dim=0).nonzero().flatten()
        chosen = real[:: -(-len(real) // QUERIES) or 1]
        logits = query[place][:, chosen].float() @ keys.transpose(1, 2)
        logits *= query.shape[-1] ** -0.5 if scaling is None else scaling
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        if bias is not None:
            logits = logits + _of(bias, place)[:, chosen].float()
        yield logits + added[:, chosen], visible[:, chosen]


def _of(tensor: Tensor | None, place: int) -> Any:
    """Return one example's part of a tensor whose batch dimension may be 1."""
    return None if tensor is None else tensor[place if len(tensor) > 1 else 0]


def _split(
    mask: Tensor | None, length: int, *, causal: bool
) -> tuple[Bool[Tensor, "any_heads length keys"], Float[Tensor, "any_heads length keys"]]:
    """Return the visible keys, and the bias on their logits."""
    if mask is None:
        shape = torch.ones(1, length, length, dtype=torch.bool)
        visible = shape.tril() if causal else shape
        return visible, torch.zeros(1, length, length)
    mask = mask[..., :length].expand(-1, length, -1)
    if mask.dtype == torch.bool:
        return mask, torch.zeros_like(mask, dtype=torch.float32)
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return ~hidden, mask.masked_fill(hidden, 0.0).float()
