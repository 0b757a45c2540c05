"""A saved adapter and its base model to one plain model: no adapter, no PEFT to load it."""

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from dynlora.saved.adapter import SavedAdapter
from dynlora.saved.base import UNLOADABLE, BaseSource, attach, load_base, untie
from dynlora.saved.folder import new_folder

IMAGES = "preprocessor_config.json"
"""How images become tensors; beside models of images."""


def merge_adapter(adapter: SavedAdapter, source: BaseSource, output: Path) -> bool:
    """Write the base model with the adapter's update in its weights, and its tokenizer.

    Args:
        adapter: As read; its folder must still be there.
        source: Where the base model is.
        output: A new folder.

    Returns:
        Whether a tokenizer was found, too.

    Raises:
        AdapterError: If the model cannot be loaded, is another than the adapter's, or there is
            something at `output`.
    """
    base = load_base(adapter, source)
    untie(base, adapter)
    merged = attach(adapter, base).merge_and_unload(safe_merge=True)
    with new_folder(output) as draft:
        merged.save_pretrained(draft)
        images = Path(source.place) / IMAGES
        if images.is_file():
            shutil.copyfile(images, draft / IMAGES)
        return _save_tokenizer(adapter, source, draft)


def _save_tokenizer(adapter: SavedAdapter, source: BaseSource, folder: Path) -> bool:
    """Save the adapter's tokenizer, or else the base model's; a model of images has neither."""
    own = (adapter.folder / "tokenizer_config.json").is_file()
    place = BaseSource(str(adapter.folder), local_only=True) if own else source
    try:
        AutoTokenizer.from_pretrained(place.place, **place.options).save_pretrained(folder)
    except UNLOADABLE:
        return False
    return True
