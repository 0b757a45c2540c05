"""Write LoRA adapters atomically, as a PEFT folder or a single file."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from dynlora.adapter_files.adapter import SavedAdapter, configure
from dynlora.adapter_files.checks import check_finite
from dynlora.adapter_files.formats import (
    CONFIG,
    KOHYA,
    METADATA,
    PEFT,
    WEIGHTS,
    component_of,
    config_of,
    prefix_of,
)
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.tensor_file import write_tensors
from dynlora.adapters.patterns import whole
from dynlora.errors import AdapterError
from dynlora.files.whole import whole_file, whole_folder

COMPANIONS = (
    "README.md", "ranks.png", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
"""Files to copy with an adapter's weights."""


def write_adapter(
    adapter: SavedAdapter, output: Path, layers: Iterable[SavedLayer] | None = None
) -> None:
    """Write an adapter atomically to a new folder or, in the other formats, to a new file.

    A folder also gets the tokenizer and the model card beside the original adapter. `layers` yields
    the layers with their weights; None if those of `adapter` have them. Only one layer at a time is
    in memory if both are read or made one by one.
    """
    layout = dict(adapter.others)
    for layer in adapter.layers:
        layout |= layer.tensors
    made = adapter.layers if layers is None else layers
    with new_folder(output, adapter.form) as draft:
        weights, metadata = draft, {"format": "pt"}
        if adapter.form == PEFT:
            weights = draft / WEIGHTS
            _write_beside(adapter, draft)
        else:
            metadata = _file_metadata(adapter)
        with write_tensors(weights, layout, metadata) as write:
            for tensors in chain([adapter.others], (layer.tensors for layer in made)):
                check_finite(
                    tensors,
                    f"the result for {adapter.folder}",
                    "its factors or `lora_alpha` are too large to combine; scale them down",
                )
                for key, tensor in tensors.items():
                    write(key, tensor)


def _write_beside(adapter: SavedAdapter, draft: Path) -> None:
    """Write the files of a folder beside its weights."""
    for name in COMPANIONS:
        path = adapter.folder / name
        # A link in an untrusted folder may lead to any file.
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, draft / name)
    text = json.dumps(dict(adapter.config), indent=2) + "\n"
    (draft / CONFIG).write_text(text, encoding="utf-8")


def _file_metadata(adapter: SavedAdapter) -> dict[str, str]:
    """Return the metadata of a single file, with the ranks and alphas of its layers.

    Other values stay, except for kohya's hashes of the tensors.
    """
    made = {
        k: v for k, v in adapter.metadata.items() if k != METADATA and not k.startswith("sshs_")
    }
    if adapter.form == KOHYA:
        numbers: dict[str, set[float]] = {
            "ss_network_dim": {layer.r for layer in adapter.layers},
            "ss_network_alpha": {layer.lora_alpha for layer in adapter.layers},
        }
        for key, found in numbers.items():
            made[key] = str(whole(found.pop())) if len(found) == 1 else "Dynamic"
        return made
    fields: dict[str, Any] = {}
    for component in dict.fromkeys(component_of(layer.name) for layer in adapter.layers):
        own = [layer for layer in adapter.layers if component_of(layer.name) == component]
        if not any(layer.key_alpha for layer in own):  # diffusers refuses alphas in both places
            start = prefix_of(component)
            values = configure(config_of(adapter.config, component), own, component)
            fields |= {f"{start}{key}": value for key, value in values.items()}
    made["format"] = "pt"
    return made | ({METADATA: json.dumps(fields, indent=2, sort_keys=True)} if fields else {})


def check_free(output: Path, form: str = PEFT) -> None:
    """Raise `AdapterError` unless `output` can become a new folder or, for other forms, a file."""
    if form != PEFT:
        if output.suffix != ".safetensors" or output.exists():
            fault = ", which exists" if output.exists() else ""
            raise AdapterError(
                "`--output` must be a new file of kohya or diffusers, and end in .safetensors, but "
                f"got {output}{fault}. Give another name."
            )
        return
    if output.name in ("", ".."):  # the draft is a sibling, renamed at the end
        raise AdapterError(f"`--output` must be the name of a folder, but got {output}.")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise AdapterError(
                f"`--output` must be a folder, but got {output}, and {path} is a file. Give "
                "another folder."
            )
    if output.is_dir() and any(output.iterdir()):
        raise AdapterError(
            f"`--output` must be a new or empty folder, but got {output}, which contains "
            f"{sum(1 for _ in output.iterdir())} entries. Give another folder, or remove it."
        )


@contextmanager
def new_folder(output: Path, form: str = PEFT) -> Iterator[Path]:
    """Yield a draft that becomes a new folder `output` or, for other forms, a new file."""
    check_free(output, form)
    with (whole_folder if form == PEFT else whole_file)(output) as draft:
        yield draft
