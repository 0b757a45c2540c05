"""Merge a saved adapter into its base model and save a plain model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from dynlora.adapter_files.adapter import SavedAdapter, new_folder
from dynlora.adapter_files.adapter_base import BaseSource, attach, load_base, untie
from dynlora.adapter_files.base_models import UNLOADABLE

COMPANIONS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "tokenizer": ("tokenizer_config.json", AutoTokenizer.from_pretrained),
    # Pillow is always installed, and the saved processor names no backend package.
    "image processor": (
        "preprocessor_config.json",
        partial(AutoImageProcessor.from_pretrained, backend="pil"),
    ),
}
"""Tokenizer and image processor, each with the file that shows its presence and its loader."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A tokenizer or image processor, and whether it was saved with the model."""

    kind: str
    """A key of `COMPANIONS`."""
    saved: bool


def merge_adapter(
    adapter: SavedAdapter, source: BaseSource, output: Path, head: Mapping[str, Any]
) -> Companion:
    """Write the base model with the merged adapter, and its tokenizer or image processor.

    Args:
        adapter: The adapter; its folder must still exist.
        source: Location of the base model.
        output: A new folder.
        head: Configuration values about the outputs, such as label names, which adapters lack.

    Raises:
        AdapterError: If the model cannot be loaded or does not match the adapter, or `output` is
            not free.
    """
    base = load_base(adapter, source)
    base.config.update(dict(head))
    untie(base, adapter)
    merged = attach(adapter, base).merge_and_unload(safe_merge=True)
    kind = "image processor" if base.main_input_name == "pixel_values" else "tokenizer"
    file, load = COMPANIONS[kind]
    own = (adapter.folder / file).is_file()
    place = BaseSource(str(adapter.folder), local_only=True) if own else source
    with new_folder(output) as draft:
        merged.save_pretrained(draft)
        try:
            load(place.place, **place.options).save_pretrained(draft)
        except UNLOADABLE:
            return Companion(kind, saved=False)
        return Companion(kind, saved=True)
