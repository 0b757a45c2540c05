"""Merge a saved adapter into its base model and save a plain model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.adapter_base import attach, load_base, untie
from dynlora.adapter_files.base_models import UNLOADABLE, Source
from dynlora.adapter_files.writer import new_folder


def save_merged(model: PeftModel, folder: Path) -> None:
    """Write a plain model of transformers."""
    model.merge_and_unload(safe_merge=True).save_pretrained(folder)


def merge_adapter(
    adapter: SavedAdapter,
    source: Source,
    output: Path,
    head: Mapping[str, Any],
    save: Callable[[PeftModel, Path], None] = save_merged,
) -> tuple[str, bool]:
    """Write the base model with the merged adapter, and its tokenizer, image processor or both.

    The adapter's folder must still exist. `head` has configuration values that adapters lack, such
    as label names. Returns `tokenizer`, `image processor` or `processor`, and whether it was saved.
    """
    base = load_base(adapter, source)
    base.config.update(dict(head))
    untie(base, adapter)
    model = attach(adapter.folder, base)
    loader: Any
    more: dict[str, str] = {}
    kind, file, loader = "tokenizer", "tokenizer_config.json", AutoTokenizer
    if {"image", "text"} <= {*base.input_modalities}:
        kind, file, loader = "processor", "processor_config.json", AutoProcessor
    elif base.main_input_name == "pixel_values":
        kind, file, loader = "image processor", "preprocessor_config.json", AutoImageProcessor
        more = {"backend": "pil"}  # always installed, and the saved file names no backend package
    own = (adapter.folder / file).is_file()
    place = Source(str(adapter.folder), local_only=True) if own else source
    with new_folder(output) as draft:
        save(model, draft)
        try:
            found = loader.from_pretrained(place.place, **place.options, **more)
            found.save_pretrained(draft)
        except UNLOADABLE:
            return kind, False
        return kind, True
