"""A LoRA adapter's layers and configuration, in any file format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import multimode
from typing import Any

from torch import Tensor

from dynlora.adapter_files.checks import check_equal
from dynlora.adapter_files.formats import PEFT, prefix_of
from dynlora.adapter_files.layer import SavedLayer
from dynlora.adapter_files.names import natural_key
from dynlora.adapters.patterns import name_patterns, whole
from dynlora.errors import AdapterError


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
        config = configure(self.config, layers) if self.form == PEFT else self.config
        return replace(self, layers=layers, config=config)


def configure(
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


def check_linear(adapter: SavedAdapter, target: str) -> None:
    """Raise `AdapterError` unless a format that has only linear layers can hold the adapter."""
    faults = [] if adapter.form == PEFT else [f"a file of {adapter.form}"]
    for layer in adapter.layers:
        if layer.bias is not None:
            faults.append(f"a bias of lora_B in {layer.name}")
        elif layer.lora_A.dim() != 2:
            faults.append(f"a convolution, {layer.name}")
        elif layer.key_A.endswith("lora_embedding_A"):
            faults.append(f"an embedding, {layer.name}")
    faults += [f"{key} of `modules_to_save` or `bias`" for key in adapter.others]
    if faults:
        raise AdapterError(
            f"`--format {target}` needs a PEFT adapter of linear layers alone, but got "
            f"{faults[0]} in {adapter.folder}. Use `--format merged`."
        )


def match_layers(
    adapters: Sequence[SavedAdapter],
) -> tuple[list[str], Callable[[str], list[SavedLayer | None]]]:
    """Return the names of all layers of several adapters, and a function that reads one layer.

    It returns one layer per adapter, None if the adapter lacks it. Raises `AdapterError` if the
    shapes of a layer differ.
    """
    places = [
        {layer.name: place for place, layer in enumerate(adapter.layers)} for adapter in adapters
    ]

    def read(name: str) -> list[SavedLayer | None]:
        return [
            adapter.layers[own[name]] if name in own else None
            for adapter, own in zip(adapters, places, strict=True)
        ]

    names = sorted(set().union(*places), key=natural_key)
    for name in names:
        found = [
            ((tuple(layer.lora_A[0].shape), tuple(layer.lora_B[:, 0].shape)), adapter.folder)
            for layer, adapter in zip(read(name), adapters, strict=True)
            if layer is not None
        ]
        check_equal(f"shapes in layer {name!r}", *map(list, zip(*found, strict=True)))
    return names, read
