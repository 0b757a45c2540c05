"""Read a PEFT LoRA adapter from its folder, and write one to a new folder.

Adapters may come from untrusted sources: weights are read only from safetensors, because loading
a pickle can run code, and every tensor is checked.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynlora.adapter_files.checks import check_config, check_factors, check_finite
from dynlora.adapter_files.folder import copy_companions, new_folder
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.names import check_names, natural_key
from dynlora.adapter_files.patterns import match_names
from dynlora.adapters.patterns import name_patterns, whole
from dynlora.errors import AdapterError
from dynlora.files.plain_values import parse_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MAX_CONFIG_BYTES = 16 * 2**20
"""Maximum size of a configuration; larger files are refused unread."""
PREFIX = "base_model.model."
FACTORS = re.compile(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB])|lora_B\.(bias))")
"""Names of the tensors of a plain LoRA layer: `lora_A`, `lora_B` or the bias of `lora_B`."""
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
"""Configuration fields with values by pattern, and the field with the default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedAdapter:
    """A LoRA adapter, as read or to be written."""

    folder: Path
    """Folder of the original adapter."""
    config: Mapping[str, Any]
    """The adapter's `LoraConfig` as JSON, including keys of other PEFT versions."""
    layers: tuple[SavedLayer, ...]
    """Sorted by name, numbers by value."""
    others: Mapping[str, Tensor]
    """All other tensors, unchanged, such as those of `modules_to_save`."""

    @property
    def base_model(self) -> str:
        """Folder or hub name of the base model; empty if the configuration has none."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def parameters(self) -> int:
        """Parameters of the LoRA layers."""
        return sum(layer.parameters for layer in self.layers)

    def with_layers(self, layers: list[SavedLayer]) -> "SavedAdapter":
        """Return the adapter with other layers and a configuration that matches them."""
        return replace(
            self, layers=tuple(layers), config={**self.config, **_describe(tuple(layers))}
        )


def read_adapter(folder: Path) -> SavedAdapter:
    """Read and check an adapter.

    Raises:
        AdapterError: If the adapter is not plain LoRA, a file is broken or a pickle, a layer lacks
            a factor or has wrong shapes, or a weight is not finite.
    """
    config = _read_config(folder)
    check_config(config, str(folder))
    tensors = _read_weights(folder)
    check_names(tensors, folder / WEIGHTS)
    check_finite(tensors, str(folder), "its training diverged; use an earlier checkpoint")
    halves: dict[str, dict[str, str]] = {}
    for key in tensors:
        if found := FACTORS.fullmatch(key):
            name = found[1].removeprefix(PREFIX)
            halves.setdefault(name, {})[found[2] or found[3] or found[4]] = key
    names = sorted(halves, key=natural_key)
    ranks, alphas = (
        match_names(config.get(field) or {}, names, config[of_all], field=field, where=str(folder))
        for field, of_all in PATTERNS.items()
    )
    layers = tuple(
        _read_layer(name, halves[name], tensors, {**config, "r": r, "lora_alpha": alpha}, folder)
        for name, r, alpha in zip(names, ranks.values(), alphas.values(), strict=True)
    )
    own = {key for keys in halves.values() for key in keys.values()}
    others = {key: tensor for key, tensor in tensors.items() if key not in own}
    strange = next((key for key in others if ".lora_" in key), None)
    if strange is not None or not layers:
        raise AdapterError(
            f"an adapter must hold the tensors of plain LoRA (lora_A, lora_B), got "
            f"{strange or 'none of them'} in {folder / WEIGHTS}: give the folder of a LoRA adapter."
        )
    return SavedAdapter(folder=folder, config=config, layers=layers, others=others)


def write_adapter(adapter: SavedAdapter, output: Path) -> None:
    """Write an adapter to a new folder atomically.

    Raises:
        AdapterError: If `output` is not free or cannot be written, or a weight is not finite.
    """
    tensors = dict(adapter.others)
    for layer in adapter.layers:
        tensors |= {layer.key_A: layer.lora_A, layer.key_B: layer.lora_B}
        if layer.bias is not None:
            tensors[f"{layer.key_B.removesuffix('weight')}bias"] = layer.bias
    check_finite(
        tensors,
        f"what was made of {adapter.folder}",
        "its factors or `lora_alpha` are too large to be put together; scale them down",
    )
    with new_folder(output) as draft:
        copy_companions(adapter.folder, draft)
        text = json.dumps(dict(adapter.config), indent=2) + "\n"
        (draft / CONFIG).write_text(text, encoding="utf-8")
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, draft / WEIGHTS, metadata={"format": "pt"})


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        inside = folder / "adapter"
        hint = f": give {inside}" if (inside / CONFIG).is_file() else ""
        raise AdapterError(
            f"ADAPTER must be a folder with {CONFIG} and {WEIGHTS}, got {folder}, which has no "
            f"{CONFIG}{hint or ' there: give the folder that `save_pretrained` wrote'}."
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{path} must be at most {MAX_CONFIG_BYTES} bytes, got {path.stat().st_size}: this is "
            "no adapter's configuration."
        )
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} must be JSON: {error}. Save the adapter again.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, got a {type(config).__name__}.")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / PICKLE).is_file()
        raise AdapterError(
            f"the weights must be in {WEIGHTS}, got "
            + (f"{PICKLE}, a pickle, which can run code when it is loaded" if pickled else "none")
            + f" in {folder}: save the adapter again with safetensors."
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{path} ({path.stat().st_size} bytes) must be a whole safetensors file: {error}. Was "
            "it cut short? Copy or download it again."
        ) from error


def _read_layer(
    name: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
) -> SavedLayer:
    """Return a layer; `config` contains the layer's own `r` and `lora_alpha`."""
    for half in "AB":
        if half not in keys:
            raise AdapterError(
                f"layer {name!r} must have both halves, lora_A and lora_B, got no lora_{half} in "
                f"{folder}: the adapter was saved incompletely; save it again."
            )
    A, B = tensors[keys["A"]], tensors[keys["B"]]
    bias = tensors[keys["bias"]] if "bias" in keys else None
    check_factors(name, A, B, bias, rank=config["r"], where=str(folder))
    return SavedLayer(
        name=name,
        key_A=keys["A"],
        key_B=keys["B"],
        lora_A=A,
        lora_B=B,
        bias=bias,
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora")),
    )


def _describe(layers: tuple[SavedLayer, ...]) -> dict[str, Any]:
    """Return the fields of `LoraConfig` that depend on the layers."""
    # Ties go to the smaller value, so that the order of layers does not matter.
    ranks = Counter(layer.r for layer in layers)
    alphas = Counter(layer.lora_alpha for layer in layers)
    r = min(ranks, key=lambda rank: (-ranks[rank], rank))
    alpha = min(alphas, key=lambda value: (-alphas[value], value))
    return {
        "r": r,
        "lora_alpha": whole(alpha),
        "rank_pattern": name_patterns({layer.name: layer.r for layer in layers}, r),
        "alpha_pattern": name_patterns({layer.name: layer.lora_alpha for layer in layers}, alpha),
        "use_rslora": layers[0].use_rslora,
        # Some initializations refuse some ranks; loading replaces the initial weights anyway.
        "init_lora_weights": True,
        "eva_config": None,
    }
