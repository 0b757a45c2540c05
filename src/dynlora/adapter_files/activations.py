"""Run texts through an adapted model and collect second moments per LoRA layer.

Memory does not grow with the texts: only the r x r moment of ``A x`` and the output norm are kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.base_models import Source
from dynlora.adapter_files.layer import SavedLayer, Seen
from dynlora.errors import AdapterError, DataError

MAX_LENGTH = 512  # maximum number of tokens per text
BATCH = 16


def check_reads_texts(base: Any, source: Source) -> None:
    """Raise `AdapterError` if a base model reads images or audio instead of texts."""
    read = base.main_input_name
    if read != "input_ids":
        raise AdapterError(
            f"the base model must read texts to use `--data`, but got {source.label}, a "
            f"{type(base).__name__}, which reads {read}"
            f"{' of images' if read == 'pixel_values' else ''}. Leave out `--data`."
        )


def batch_texts(
    columns: Sequence[Sequence[str]], tokenizer: Any, limit: int | None
) -> list[dict[str, Tensor]]:
    """Tokenize texts, or pairs of texts, into batches of arguments for a model's `forward`.

    `limit` is the maximum number of positions of the model; None if unlimited.
    """
    longest = min(MAX_LENGTH, limit or MAX_LENGTH, tokenizer.model_max_length)
    batches = []
    for start in range(0, len(columns[0]), BATCH):
        texts = [list(column[start : start + BATCH]) for column in columns]
        encoded = tokenizer(
            *texts, truncation=True, max_length=longest, padding=True, return_tensors="pt"
        )
        if encoded["input_ids"].shape[1]:  # empty texts may have no tokens
            batches.append(dict(encoded))
    if not batches:
        raise DataError(
            f"`--data` must have texts with at least one token, but got {len(columns[0])} rows "
            "without any. Name another column with `--text`."
        )
    return batches


@torch.no_grad()
def observe_texts(
    model: Any, adapter: SavedAdapter, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Seen]:
    """Run batches through the adapted model and return statistics per LoRA layer.

    `adapter` must be the only one of the `PeftModel`. Tokens outside `attention_mask` do not count.
    """
    find = model.base_model.model.get_submodule
    watches = {layer.name: _Watch(find(layer.name), layer) for layer in adapter.layers}
    try:
        for batch in batches:
            for watch in watches.values():
                watch.mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            more: dict[str, Tensor] = {}
            if model.config.is_encoder_decoder:  # the decoder reads the same text, shifted
                shift = model.get_base_model().prepare_decoder_input_ids_from_labels
                more = {"decoder_input_ids": shift(batch["input_ids"])}
            model(**batch, **more)
    finally:
        for watch in watches.values():
            for handle in watch.handles:
                handle.remove()
    seen = {}
    for name, found in watches.items():
        if not found.tokens or not torch.isfinite(found.gram).all():
            raise AdapterError(
                f"every layer must receive finite input from the texts, but got {found.tokens} "
                f"tokens in layer {name!r}, perhaps not all finite. Check `--data` and `--model`."
            )
        power = found.power / max(found.outputs, 1)
        seen[name] = Seen(gram=found.gram / found.tokens, output_power=power, tokens=found.tokens)
    return seen


class _Watch:
    """Sums over all inputs and outputs of one PEFT LoRA layer, collected by hooks."""

    def __init__(self, module: Any, layer: SavedLayer) -> None:
        (self.adapter,) = module.active_adapters
        self.channels_second = layer.lora_A.dim() > 2
        self.mask: Tensor | None = None
        self.gram = torch.zeros(layer.r, layer.r, dtype=torch.float64)
        self.power = 0.0
        self.tokens = self.outputs = 0
        self.handles = [module.register_forward_hook(self._on_output)]
        if self.adapter in module.lora_A:
            self.handles.append(module.lora_A[self.adapter].register_forward_hook(self._on_inner))

    def _on_inner(self, _: nn.Module, __: Any, inner: Tensor) -> None:
        wide = self._rows(inner).double()
        self.gram += (wide.T @ wide).cpu()
        self.tokens += len(wide)

    def _on_output(self, module: Any, inputs: Any, output: Tensor) -> None:
        rows = self._rows(output)
        self.power += float(rows.double().square().sum())
        self.outputs += len(rows)
        if self.adapter in module.lora_embedding_A:  # a parameter, so there is no module to hook
            columns = module.lora_embedding_A[self.adapter].T[inputs[0]]
            scale = module._get_embed_scale()  # scales base and adapter, as in Gemma
            self._on_inner(module, inputs, columns if scale is None else columns * scale)

    def _rows(self, values: Tensor) -> Tensor:
        """Return a row per token without padding; for images, a row per position."""
        if self.channels_second:
            values = values.movedim(1, -1)
        if self.mask is not None and values.shape[:-1] == self.mask.shape:
            return values[self.mask]
        return values.flatten(0, -2)
