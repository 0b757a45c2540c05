"""A saved adapter and its base model to one plain model: no adapter, no PEFT to load it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from dynlora.base_models import UNLOADABLE
from dynlora.saved.adapter import SavedAdapter
from dynlora.saved.base import BaseSource, attach, load_base, untie
from dynlora.saved.folder import new_folder

COMPANIONS: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "tokenizer": ("tokenizer_config.json", AutoTokenizer.from_pretrained),
    # Pillow is always there; what is saved names no package.
    "image processor": (
        "preprocessor_config.json",
        partial(AutoImageProcessor.from_pretrained, backend="pil"),
    ),
}
"""What makes a model's inputs: its file, by which it is known to be there, and what loads it."""
READS_IMAGES = "pixel_values"
"""What transformers calls the main input of models that read images."""


@dataclass(frozen=True, slots=True)
class Companion:
    """What makes a model's inputs, and whether it could be saved beside the model."""

    kind: str
    """One of `COMPANIONS`."""
    saved: bool


def merge_adapter(
    adapter: SavedAdapter, source: BaseSource, output: Path, head: Mapping[str, Any]
) -> Companion:
    """Write the base model with the adapter's update in its weights, and what makes its inputs.

    Args:
        adapter: As read; its folder must still be there.
        source: Where the base model is.
        output: A new folder.
        head: What the configuration shall say of the outputs, by key; an adapter does not tell.

    Returns:
        Whether a tokenizer or image processor was found, too.

    Raises:
        AdapterError: If the model cannot be loaded, is another than the adapter's, or there is
            something at `output`.
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
    """Save what lies beside the adapter, or else beside the base model, if it can be loaded."""
    file, load = COMPANIONS[kind]
    own = (adapter.folder / file).is_file()
    place = BaseSource(str(adapter.folder), local_only=True) if own else source
    try:
        load(place.place, **place.options).save_pretrained(folder)
    except UNLOADABLE:
        return False
    return True
