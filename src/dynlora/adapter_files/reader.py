"""Read and check LoRA adapters, perhaps from an untrusted source.

An adapter is a PEFT folder, or a single file of kohya or diffusers. Weights are read only from
safetensors, because loading a pickle can run code.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dynlora.adapter_files.adapter import SavedAdapter, StoredLayers
from dynlora.adapter_files.checks import check_config, check_factors, check_finite, check_number
from dynlora.adapter_files.formats import (
    CONFIG,
    DIFFUSERS,
    FILE_KEYS,
    KOHYA,
    METADATA,
    OTHER_METHODS,
    PEFT_KEYS,
    WEIGHTS,
    component_of,
    config_of,
    group_keys,
    prefix_of,
)
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.names import check_names, match_names, natural_key
from dynlora.adapter_files.tensor_file import TensorFile
from dynlora.errors import AdapterError
from dynlora.files.plain_values import parse_json

PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 16 * 2**20  # larger files are refused unread
Declared = tuple[int | None, float | None, bool]  # rank, alpha and use of rsLoRA of a layer
UNDECLARED: Declared = (None, None, False)


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
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        raise AdapterError(
            f"a single file must be of kohya or diffusers, but got {path}, whose scale is in the "
            f"{CONFIG} beside it. Give the folder {path.parent}."
        )
    tensors = _open_tensors(path)
    keys, others = group_keys(tensors, FILE_KEYS)
    if others or not keys:
        key = min(others, default="none")
        methods = [f" of {method}" for part, method in OTHER_METHODS.items() if part in key]
        raise AdapterError(
            "a single file must contain factors and alphas of plain LoRA, and nothing else, but "
            f"got {key}{''.join(methods[:1])} in {path}. Give another adapter."
        )
    fields = tensors.metadata.get(METADATA, "{}").encode()
    config = _parse_config(fields, f"`{METADATA}` in {path}")
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
    return _parse_config(path.read_bytes(), str(path))


def _parse_config(content: bytes, where: str) -> dict[str, Any]:
    try:
        config = parse_json(content.decode())
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
