"""LoRA adapters, perhaps from an untrusted source: read, check, write.

An adapter is a PEFT folder, or a single file of kohya or diffusers. Weights are read only from
safetensors, because loading a pickle can run code.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import multimode
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from dynlora.adapter_files.checks import (
    check_config,
    check_equal,
    check_factors,
    check_finite,
    check_number,
)
from dynlora.adapter_files.formats import (
    DIFFUSERS,
    FILE_KEYS,
    KOHYA,
    METADATA,
    OTHER_METHODS,
    PEFT,
    PEFT_KEYS,
    component_of,
    config_of,
    group_keys,
    prefix_of,
)
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.names import check_names, match_names, natural_key
from dynlora.adapter_files.tensor_file import TensorFile, write_tensors
from dynlora.adapters.patterns import name_patterns, whole
from dynlora.errors import AdapterError
from dynlora.files.plain_values import parse_json
from dynlora.files.whole import whole_file, whole_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 16 * 2**20  # larger files are refused unread
COMPANIONS = (
    "README.md", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip
"""Files to copy with an adapter's weights."""
Declared = tuple[int | None, float | None, bool]  # rank, alpha and use of rsLoRA of a layer
UNDECLARED: Declared = (None, None, False)


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

    folder: Path  # of the original adapter, or its single file
    form: str = PEFT  # or `KOHYA` or `DIFFUSERS`
    config: Mapping[str, Any]
    """Its `LoraConfig` as JSON, including keys of other PEFT versions; in a file of diffusers, all
    keys begin with a component; empty if a file has none."""
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a single file
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
        config = _configure(self.config, layers) if self.form == PEFT else self.config
        return replace(self, layers=layers, config=config)


def read_any(place: Path) -> SavedAdapter:
    """Read and check an adapter: a PEFT folder, or a single file of kohya or diffusers.

    Raises `AdapterError` like `read_adapter`.
    """
    return _read_file(place) if place.is_file() else read_adapter(place)


def read_adapter(folder: Path) -> SavedAdapter:
    """Read and check the folder of a PEFT adapter.

    Raises `AdapterError` if the adapter is not plain LoRA, a file is broken or a pickle, a layer
    lacks a factor or has wrong shapes, or a weight is not finite.
    """
    config, path = _read_config(folder), folder / WEIGHTS
    check_config(config, str(folder))
    if not path.is_file():
        pickled = (folder / PICKLE).is_file()
        raise AdapterError(
            f"the weights must be in {WEIGHTS}, but got "
            + (f"{PICKLE}, a pickle, which can run code when it is loaded" if pickled else "none")
            + f" in {folder}. Save the adapter again with safetensors."
        )
    tensors = _open_tensors(path)
    keys, others = group_keys(tensors, PEFT_KEYS)
    strange = next((key for key in others if ".lora_" in key), None)
    if strange is not None or not keys:
        raise AdapterError(
            f"an adapter must contain the tensors of plain LoRA (lora_A, lora_B), but got "
            f"{strange or 'none of them'} in {path}. Give the folder of a LoRA adapter."
        )
    layers = _store_layers(keys, tensors, _declared(config, list(keys), folder), folder)
    kept = TensorFile(path, others)
    return SavedAdapter(folder=folder, config=config, layers=layers, others=kept)


def _read_file(path: Path) -> SavedAdapter:
    """Read and check a single file of kohya or diffusers."""
    tensors = _open_tensors(path)
    keys, others = group_keys(tensors, FILE_KEYS)
    if others or not keys:
        key = min(others, default="none")
        methods = [f" of {method}" for part, method in OTHER_METHODS.items() if part in key]
        raise AdapterError(
            "a single file must contain factors and alphas of plain LoRA, and nothing else, but "
            f"got {key}{''.join(methods[:1])} in {path}. Give another adapter."
        )
    config = _parse_config(tensors.metadata.get(METADATA, "{}"), f"`{METADATA}` in {path}")
    declared: dict[str, Declared] = {}
    for component in {component_of(name) for name in keys}:
        start = prefix_of(component)
        names = [name for name in keys if component_of(name) == component]
        if own := config_of(config, component):
            check_config(own, str(path))
            found = _declared(own, [name.removeprefix(start) for name in names], path)
            declared |= {f"{start}{name}": value for name, value in found.items()}
    return SavedAdapter(
        folder=path,
        form=KOHYA if any(".lora_down." in key for key in tensors) else DIFFUSERS,
        config=config,
        metadata=tensors.metadata,
        layers=_store_layers(keys, tensors, declared, path),
        others={},
    )


def _declared(config: Mapping[str, Any], names: Sequence[str], place: Path) -> dict[str, Declared]:
    """Return the values that a configuration gives to layers, by name."""
    ranks, alphas = (
        match_names(config.get(key) or {}, names, config[default], field=key, where=str(place))
        for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return {name: (ranks[name], alphas[name], bool(config.get("use_rslora"))) for name in names}


def _store_layers(
    keys: Mapping[str, Mapping[str, str]],
    tensors: TensorFile,
    declared: Mapping[str, Declared],
    place: Path,
) -> StoredLayers:
    """Check and return the layers. Without a declared alpha, a layer's scaling is 1."""
    names = sorted(keys, key=natural_key)
    alphas: dict[str, float] = {}
    for name in names:
        own = keys[name]
        for half in "AB":
            if half not in own:
                raise AdapterError(
                    f"layer {name!r} must have both lora_A and lora_B, but got no lora_{half} in "
                    f"{place}: the adapter was saved incompletely. Save it again."
                )
        A, B, bias = tensors[own["A"]], tensors[own["B"]], tensors.get(own.get("bias", ""))
        rank, alpha, _ = declared.get(name, UNDECLARED)
        check_factors(name, A, B, bias, rank=rank, where=str(place))
        if "alpha" in own:
            given = tensors[own["alpha"]]
            value: Any = given.item() if given.numel() == 1 else tuple(given.shape)
            check_number(value, own["alpha"], str(place), whole=False)
            alpha = value
        alphas[name] = len(A) if alpha is None else alpha

    def read(name: str) -> SavedLayer:
        own = keys[name]
        return SavedLayer(
            name=name,
            key_A=own["A"],
            key_B=own["B"],
            key_alpha=own.get("alpha"),
            lora_A=tensors[own["A"]],
            lora_B=tensors[own["B"]],
            bias=tensors.get(own.get("bias", "")),
            lora_alpha=alphas[name],
            use_rslora=declared.get(name, UNDECLARED)[2],
        )

    return StoredLayers(read, names)


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
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise AdapterError(f"{path} must be JSON: {error}. Save the adapter again.") from error
    return _parse_config(text, str(path))


def _parse_config(text: str, where: str) -> dict[str, Any]:
    try:
        config = parse_json(text)
    except ValueError as error:
        raise AdapterError(f"{where} must be JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{where} must be a JSON object, but got a {type(config).__name__}.")
    return config


def _open_tensors(path: Path) -> TensorFile:
    try:
        tensors = TensorFile(path)
        check_names(tensors, path)
        check_finite(tensors, str(path), "its training diverged; use an earlier checkpoint")
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} ({path.stat().st_size} bytes) must be a whole safetensors file: {error}. Was "
            "it cut short? Copy or download it again."
        ) from error
    return tensors


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


def _configure(
    config: Mapping[str, Any], layers: Sequence[SavedLayer], component: str = ""
) -> dict[str, Any]:
    """Return a `LoraConfig` as JSON that matches the layers of one component."""
    prefix = prefix_of(component)
    ranks = {layer.name.removeprefix(prefix): layer.r for layer in layers}
    alphas = {layer.name.removeprefix(prefix): layer.lora_alpha for layer in layers}
    r, alpha = min(multimode(ranks.values())), min(multimode(alphas.values()))
    return {
        "peft_type": "LORA",
        "target_modules": list(ranks),
        **config,
        "r": r,
        "lora_alpha": whole(alpha),
        "rank_pattern": name_patterns(ranks, r),
        "alpha_pattern": name_patterns(alphas, alpha),
        "use_rslora": layers[0].use_rslora,
        # Some initializations refuse some ranks; loading replaces the initial weights anyway.
        "init_lora_weights": True,
        "eva_config": None,
    }


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
            values = _configure(config_of(adapter.config, component), own, component)
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
    """Yield a folder or, for other forms, a file that becomes `output`, or raise `AdapterError`."""
    check_free(output, form)
    try:
        with (whole_folder if form == PEFT else whole_file)(output) as draft:
            yield draft
    except OSError as error:
        raise AdapterError(f"{output} could not be written: {error}.") from error
