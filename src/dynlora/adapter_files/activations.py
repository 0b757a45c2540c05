"""Run texts through an adapted model and collect second moments per layer.

Only the r x r moment of ``A x`` and the output norm are accumulated, in float64, so memory does
not depend on the number of tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.errors import AdapterError


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Statistics of one layer's inputs and outputs."""

    gram: Float[Tensor, "r r"]
    """Mean over tokens of ``(A x)(A x)^T``; float64."""
    output_power: float
    """Mean squared norm of the layer's output, base and adapter together."""
    tokens: int
    """Number of tokens; for a convolution, of positions."""


class _Watch:
    """Sums over all inputs and outputs of one layer."""

    def __init__(self, rank: int) -> None:
        self.gram = torch.zeros(rank, rank, dtype=torch.float64)
        self.inner_count = 0
        self.power = 0.0
        self.output_count = 0

    def add_inner(self, inner: Float[Tensor, "n r"]) -> None:
        wide = inner.double()
        self.gram += (wide.T @ wide).cpu()
        self.inner_count += len(inner)

    def add_output(self, output: Float[Tensor, "n out"]) -> None:
        self.power += float(output.double().square().sum())
        self.output_count += len(output)

    def seen(self) -> Seen:
        return Seen(
            gram=self.gram / max(self.inner_count, 1),
            output_power=self.power / max(self.output_count, 1),
            tokens=self.inner_count,
        )


@torch.no_grad()
def observe_texts(
    model: Any, adapter: SavedAdapter, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Seen]:
    """Run batches through the adapted model and return statistics per LoRA layer.

    Args:
        model: The `PeftModel` with the adapter as its only one.
        adapter: The same adapter as read from disk.
        batches: Arguments of the model's `forward`; `attention_mask` excludes padding.

    Raises:
        AdapterError: If a layer received no input, or non-finite input.
    """
    mask: list[Tensor] = []
    convolutions = {layer.name for layer in adapter.layers if layer.lora_A.dim() > 2}
    watches = {layer.name: _Watch(layer.r) for layer in adapter.layers}
    with ExitStack() as stack:
        for name, watch in watches.items():
            module = model.base_model.model.get_submodule(name)
            rows = partial(_rows, masks=mask, channels_second=name in convolutions)
            stack.enter_context(_watched(module, watch, rows))
        for batch in batches:
            mask[:] = [batch["attention_mask"].bool()] if "attention_mask" in batch else []
            model(**batch, **_said(model, batch))
    for name, watch in watches.items():
        if not watch.inner_count or not torch.isfinite(watch.gram).all():
            raise AdapterError(
                f"every layer must see finite input from the texts, got {watch.inner_count} tokens "
                f"in layer {name!r}, some of them perhaps not finite: check `--data` and `--model`."
            )
    return {name: watch.seen() for name, watch in watches.items()}


def _said(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the decoder input of an encoder-decoder: the encoder's text, shifted as a label."""
    if not model.config.is_encoder_decoder:
        return {}
    shifted = model.get_base_model().prepare_decoder_input_ids_from_labels(batch["input_ids"])
    return {"decoder_input_ids": shifted}


@contextmanager
def _watched(module: Any, watch: _Watch, rows: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Collect statistics of one PEFT LoRA layer; `rows` returns one row per token of a tensor."""
    (adapter,) = module.active_adapters

    def on_inner(_: nn.Module, __: Any, output: Tensor) -> None:
        watch.add_inner(rows(output))

    def on_output(_: nn.Module, inputs: Any, output: Tensor) -> None:
        watch.add_output(rows(output))
        if adapter in module.lora_embedding_A:  # a parameter, so there is no module to hook
            columns = module.lora_embedding_A[adapter].T[inputs[0]]
            scale = module._get_embed_scale()  # scales base and adapter, as in Gemma
            watch.add_inner(rows(columns if scale is None else columns * scale))

    handles = [module.register_forward_hook(on_output)]
    if adapter in module.lora_A:
        handles.append(module.lora_A[adapter].register_forward_hook(on_inner))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(values: Tensor, *, masks: Sequence[Tensor], channels_second: bool) -> Tensor:
    """Return a row per token without padding; for images, a row per position."""
    if channels_second:
        values = values.movedim(1, -1)
    for mask in masks:
        if values.shape[:-1] == mask.shape:
            return values[mask]
    return values.flatten(0, -2)
