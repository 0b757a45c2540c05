"""Merge a saved adapter into its base model and save a plain model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.base import BaseSource, attach, load_base, untie
from dynlora.adapter_files.base_models import UNLOADABLE
from dynlora.adapter_files.folder import new_folder

COMPANIONS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "tokenizer": ("tokenizer_config.json", AutoTokenizer.from_pretrained),
    # Pillow is always installed, and the saved processor names no backend package.
    "image processor": (
        "preprocessor_config.json",
        partial(AutoImageProcessor.from_pretrained, backend="pil"),
    ),
}
"""Tokenizer and image processor, each with the file that shows its presence and its loader."""
READS_IMAGES = "pixel_values"
"""Main input of image models in transformers."""


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

    Returns:
        Whether a tokenizer or image processor was saved too.

    Raises:
        AdapterError: If the model cannot be loaded or does not match the adapter, or `output` is
            not free.
    """
    base = load_base(adapter, source)
    base.config.update(dict(head))
    untie(base, adapter)
    merged = attach(adapter, base).merge_and_unload(safe_merge=True)
    with new_folder(output) as draft:
        merged.save_pretrained(draft)
        kind = "image processor" if base.main_input_name == READS_IMAGES else "tokenizer"
        return Companion(kind, _save_companion(kind, adapter, source, draft))


def _save_companion(kind: str, adapter: SavedAdapter, source: BaseSource, folder: Path) -> bool:
    """Save the companion of the adapter, else of the base model, if it can be loaded."""
    file, load = COMPANIONS[kind]
    own = (adapter.folder / file).is_file()
    place = BaseSource(str(adapter.folder), local_only=True) if own else source
    try:
        load(place.place, **place.options).save_pretrained(folder)
    except UNLOADABLE:
        return False
    return True
