"""Read a saved LoRA adapter's ranks from the shapes in its file header, without loading tensors."""

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dynlora.adapter_files.names import check_names, natural_key
from dynlora.errors import RunFileError

WEIGHTS = "adapter_model.safetensors"
FACTOR = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:embedding_)?A(?:\.weight)?$")
"""Name under which PEFT saves `lora_A`, whose first axis is the rank."""


def read_adapter_ranks(folder: Path) -> dict[str, int]:
    """Return the rank per module, by its name in the base model; empty without an adapter file.

    Args:
        folder: Written by `save_pretrained`. Modules are returned in natural order (block 2 before
            10), because the file sorts its names alphabetically.

    Raises:
        AdapterError: If a tensor's name is too long.
        RunFileError: If the adapter's file is truncated or not a safetensors file.
    """
    path = folder / WEIGHTS
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            keys = file.keys()
            check_names(keys, path)
            found = {match["module"]: key for key in keys if (match := FACTOR.match(key))}
            modules = sorted(found, key=natural_key)
            return {module: file.get_slice(found[module]).get_shape()[0] for module in modules}
    except (OSError, SafetensorError) as error:
        raise RunFileError(
            f"an adapter's {WEIGHTS} must be a whole safetensors file, got {error} for {path} of "
            f"{path.stat().st_size} bytes: restore the file from a copy, or train again."
        ) from error
