"""The folder of a PEFT LoRA adapter, perhaps from an untrusted source: read, check, write.

Weights are read only from safetensors, because loading a pickle can run code.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import multimode
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dynlora.adapter_files.checks import check_config, check_equal, check_factors, check_finite
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.names import check_names, match_names, natural_key
from dynlora.adapter_files.tensor_file import TensorFile, write_tensors
from dynlora.adapters.patterns import name_patterns, whole
from dynlora.errors import AdapterError
from dynlora.files.plain_values import parse_json
from dynlora.files.whole import whole_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 16 * 2**20  # larger files are refused unread
PREFIX = "base_model.model."
FACTORS = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB])|lora_B\.(bias))")
"""Names of the tensors of a plain LoRA layer: `lora_A`, `lora_B` or the bias of `lora_B`."""
COMPANIONS = (
    "README.md", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
"""Files to copy with an adapter's weights."""


class StoredLayers(Sequence[SavedLayer]):
    """Layers that are read at each access, so that only layers in use are in memory."""

    def __init__(self, read: Callable[[str], SavedLayer], names: Sequence[str]) -> None:
        """Use `read` to read the layer of a name."""
        self._read, self._names = read, names

    def __getitem__(self, place: Any) -> Any:
        return self._read(self._names[place])

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedAdapter:
    """A LoRA adapter, as read or to be written."""

    folder: Path  # of the original adapter
    config: Mapping[str, Any]  # its `LoraConfig` as JSON, including keys of other PEFT versions
    layers: Sequence[SavedLayer]  # sorted by name, numbers by value; read at each access
    others: Mapping[str, Tensor]  # all other tensors, unchanged, such as those of `modules_to_save`

    @property
    def base_model(self) -> str:
        """Folder or hub name of the base model; empty if the configuration has none."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def parameters(self) -> int:
        """Parameters of the LoRA layers."""
        return sum(layer.parameters for layer in self.layers)

    def with_layers(self, layers: Sequence[SavedLayer]) -> "SavedAdapter":
        """Return the adapter with other layers and a configuration that matches them."""
        ranks = {layer.name: layer.r for layer in layers}
        alphas = {layer.name: layer.lora_alpha for layer in layers}
        r, alpha = min(multimode(ranks.values())), min(multimode(alphas.values()))
        changed = {
            "r": r,
            "lora_alpha": whole(alpha),
            "rank_pattern": name_patterns(ranks, r),
            "alpha_pattern": name_patterns(alphas, alpha),
            "use_rslora": layers[0].use_rslora,
            # Some initializations refuse some ranks; loading replaces the initial weights anyway.
            "init_lora_weights": True,
            "eva_config": None,
        }
        return replace(self, layers=layers, config={**self.config, **changed})


def read_adapter(folder: Path) -> SavedAdapter:
    """Read and check an adapter.

    Raises `AdapterError` if the adapter is not plain LoRA, a file is broken or a pickle, a layer
    lacks a factor or has wrong shapes, or a weight is not finite.
    """
    config = _read_config(folder)
    check_config(config, str(folder))
    tensors = _open_weights(folder)
    keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        if found := FACTORS.fullmatch(key):
            name = found[1].removeprefix(PREFIX)
            keys.setdefault(name, {})[found[2] or found[3] or found[4]] = key
    factors = {key for own in keys.values() for key in own.values()}
    others = TensorFile(folder / WEIGHTS, (key for key in tensors if key not in factors))
    strange = next((key for key in others if ".lora_" in key), None)
    if strange is not None or not keys:
        raise AdapterError(
            f"an adapter must contain the tensors of plain LoRA (lora_A, lora_B), but got "
            f"{strange or 'none of them'} in {folder / WEIGHTS}. Give the folder of a LoRA adapter."
        )
    names = sorted(keys, key=natural_key)
    ranks, alphas = (
        match_names(config.get(field) or {}, names, config[default], field=field, where=str(folder))
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    for name in names:
        own = keys[name]
        for half in "AB":
            if half not in own:
                raise AdapterError(
                    f"layer {name!r} must have both lora_A and lora_B, but got no lora_{half} in "
                    f"{folder}: the adapter was saved incompletely. Save it again."
                )
        A, B, bias = tensors[own["A"]], tensors[own["B"]], tensors.get(own.get("bias", ""))
        check_factors(name, A, B, bias, rank=ranks[name], where=str(folder))

    def read(name: str) -> SavedLayer:
        own = keys[name]
        return SavedLayer(
            name=name,
            key_A=own["A"],
            key_B=own["B"],
            lora_A=tensors[own["A"]],
            lora_B=tensors[own["B"]],
            bias=tensors.get(own.get("bias", "")),
            lora_alpha=alphas[name],
            use_rslora=bool(config.get("use_rslora")),
        )

    return SavedAdapter(
        folder=folder, config=config, layers=StoredLayers(read, names), others=others
    )


def match_layers(adapters: Sequence[SavedAdapter]) -> dict[str, list[SavedLayer | None]]:
    """Return each layer of any adapter, by name: one entry per adapter, None if it lacks the layer.

    Raises `AdapterError` if the shapes of a layer differ.
    """
    held = [{layer.name: layer for layer in adapter.layers} for adapter in adapters]
    found = {}
    for name in sorted(set().union(*held), key=natural_key):
        found[name] = [layers.get(name) for layers in held]
        shapes, folders = [], []
        for layer, adapter in zip(found[name], adapters, strict=True):
            if layer is not None:
                shapes.append((tuple(layer.lora_A[0].shape), tuple(layer.lora_B[:, 0].shape)))
                folders.append(adapter.folder)
        check_equal(f"shapes in layer {name!r}", shapes, folders)
    return found


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inside = folder / "adapter"
        hint = f": give {inside}" if (inside / CONFIG).is_file() else ""
        raise AdapterError(
            f"ADAPTER must be a folder with {CONFIG} and {WEIGHTS}, but got {folder} without "
            f"{CONFIG}{hint or ': give the folder that `save_pretrained` wrote'}."
        )
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{path} must be at most {MAX_CONFIG_BYTES} bytes, but got {size}: this is not the "
            "configuration of an adapter."
        )
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} must be JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must be a JSON object, but got a {type(config).__name__}.")
    return config


def _open_weights(folder: Path) -> TensorFile:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / PICKLE).is_file()
        raise AdapterError(
            f"the weights must be in {WEIGHTS}, but got "
            + (f"{PICKLE}, a pickle, which can run code when it is loaded" if pickled else "none")
            + f" in {folder}. Save the adapter again with safetensors."
        )
    try:
        tensors = TensorFile(path)
        check_names(tensors, path)
        check_finite(tensors, str(folder), "its training diverged; use an earlier checkpoint")
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} ({path.stat().st_size} bytes) must be a whole safetensors file: {error}. Was "
            "it cut short? Copy or download it again."
        ) from error
    return tensors


def write_adapter(
    adapter: SavedAdapter, output: Path, layers: Iterable[SavedLayer] | None = None
) -> None:
    """Write an adapter to a new folder atomically, with the tokenizer and model card beside it.

    `layers` yields the layers with their weights; None if those of `adapter` have them. Only one
    layer at a time is in memory if both are read or made one by one.
    """
    layout = dict(adapter.others)
    for layer in adapter.layers:
        layout |= layer.tensors
    made = adapter.layers if layers is None else layers
    with new_folder(output) as draft:
        for name in COMPANIONS:
            path = adapter.folder / name
            # A link in an untrusted folder may lead to any file.
            if path.is_file() and not path.is_symlink():
                shutil.copyfile(path, draft / name)
        text = json.dumps(dict(adapter.config), indent=2) + "\n"
        (draft / CONFIG).write_text(text, encoding="utf-8")
        with write_tensors(draft / WEIGHTS, layout) as write:
            for tensors in chain([adapter.others], (layer.tensors for layer in made)):
                check_finite(
                    tensors,
                    f"the result for {adapter.folder}",
                    "its factors or `lora_alpha` are too large to combine; scale them down",
                )
                for key, tensor in tensors.items():
                    write(key, tensor)


def check_free(output: Path) -> None:
    """Raise `AdapterError` unless `output` can become a new folder."""
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
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder that becomes `output`; raise `AdapterError` if that fails."""
    check_free(output)
    try:
        with whole_folder(output) as draft:
            yield draft
    except OSError as error:
        raise AdapterError(f"{output} could not be written: {error}.") from error
