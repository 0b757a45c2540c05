"""Convert adapters between PEFT folders and the single files of kohya and diffusers.

The factors stay as they are. kohya's names have underscores for dots, so only the names of the base
model's weights tell which modules they mean.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dynlora.adapter_files.adapter import SavedAdapter, StoredLayers
from dynlora.adapter_files.formats import (
    DIFFUSERS,
    FILE_KEYS,
    KOHYA,
    KOHYA_PREFIXES,
    PEFT,
    PREFIX,
    component_of,
    config_of,
    from_sgm,
    group_keys,
    kohya_name,
    prefix_of,
)
from dynlora.adapter_files.layer import SavedLayer
from dynlora.errors import AdapterError

Place = tuple[str, str]  # component of a pipeline, empty if unknown, and module in it
UNET = "lora_unet_"


def convert(
    adapter: SavedAdapter, form: str, component: str | None = None, model: Path | None = None
) -> SavedAdapter:
    """Return an adapter with the same factors and function in the format `form`.

    `component` is the one that a PEFT adapter belongs to; of a file, the only one to keep. Only
    files of kohya need `model`, the folder of the base model as a pipeline of diffusers. Raises
    `AdapterError` if the format cannot hold the adapter, its component is unknown, or a name of
    kohya does not mean exactly one module of the base model.
    """
    if adapter.form == form:
        return adapter.with_layers(adapter.layers)
    if form != PEFT:
        _check_plain(adapter, form)
    places = _kohya_places(adapter, model) if adapter.form == KOHYA else _places(adapter)
    found = sorted({place[0] for place in places.values()} - {""})
    if component is not None and not found:
        places = {name: (component, module) for name, (_, module) in places.items()}
    elif component is not None:
        places = {name: place for name, place in places.items() if place[0] == component}
    components = {place[0] for place in places.values()}
    if len(components) != 1 if form == PEFT else not components or "" in components:
        raise AdapterError(
            f"`--component` must be {' or '.join(found or KOHYA_PREFIXES)} to convert "
            f"{adapter.folder}, but got {component or 'none'}."
        )
    given = adapter.config
    config = {
        f"{'' if form == PEFT else prefix_of(name)}{key}": value
        for name in components
        for key, value in (given if adapter.form == PEFT else config_of(given, name)).items()
    }
    where = {layer.name: index for index, layer in enumerate(adapter.layers)}

    def read(name: str) -> SavedLayer:
        return _rename(adapter.layers[where[name]], form, *places[name], components)

    made = replace(adapter, form=form, config=config)
    return made.with_layers(StoredLayers(read, list(places)))


def _check_plain(adapter: SavedAdapter, form: str) -> None:
    """Check that a single file can hold all tensors."""
    held = {end: half for end, half in FILE_KEYS.items() if form == DIFFUSERS or half != "bias"}
    keys = [*adapter.others, *(key for layer in adapter.layers for key in layer.tensors)]
    if extra := group_keys(keys, held)[1]:
        raise AdapterError(
            f"a file of {form} can hold only the factors of linear and convolutional layers, but "
            f"got {extra[0]} in {adapter.folder}. Keep the PEFT folder."
        )


def _places(adapter: SavedAdapter) -> dict[str, Place]:
    """Return component and module by layer; the names in a PEFT folder have no component."""
    places = {}
    for layer in adapter.layers:
        component = "" if adapter.form == PEFT else component_of(layer.name)
        places[layer.name] = component, layer.name.removeprefix(prefix_of(component))
    return places


def _kohya_places(adapter: SavedAdapter, model: Path | None) -> dict[str, Place]:
    """Return component and module by layer, from the base model's names."""
    if model is None:
        raise AdapterError(
            f"the names in a file of kohya, such as {adapter.layers[0].name}, have underscores for "
            "dots. Add `--model`, the folder of the base model as a diffusers pipeline, which has "
            "the modules' names."
        )
    known = _base_names(model)
    places: dict[str, Place] = {}
    for layer in adapter.layers:
        original = f"{UNET}{from_sgm(layer.name.removeprefix(UNET))}"
        found = known.get(layer.name) or known.get(original) or set()
        if len(found) != 1 or found <= set(places.values()):
            raise AdapterError(
                f"each name in a file of kohya must mean one module of the base model, but got "
                f"{layer.name}, which means {len(found)} in {model}. Use the model that the "
                "adapter was trained on."
            )
        (places[layer.name],) = found
    return places


def _base_names(model: Path) -> dict[str, set[Place]]:
    """Return the modules of a pipeline by the names that kohya may give them."""
    known: dict[str, set[Place]] = {}
    for component in KOHYA_PREFIXES:
        for path in sorted((model / component).glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    keys = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise AdapterError(f"{path} must be a whole safetensors file: {error}.") from error
            for key in keys:
                module = key.rpartition(".")[0]
                if "text_projection.weight" not in keys:  # `CLIPTextModel` of transformers 4
                    module = module.removeprefix("text_model.")
                for components in ({component}, KOHYA_PREFIXES):
                    name = kohya_name(component, module, components)
                    known.setdefault(name, set()).add((component, module))
    if not known:
        raise AdapterError(
            f"`--model` must be the folder of a diffusers pipeline, with safetensors files in "
            f"{' or '.join(KOHYA_PREFIXES)}, but got {model}."
        )
    return known


def _rename(
    layer: SavedLayer, form: str, component: str, module: str, components: Collection[str]
) -> SavedLayer:
    """Return the layer with the names of a format."""
    if form == KOHYA:
        name = kohya_name(component, module, components)
        alpha = layer.scaling * layer.r if layer.use_rslora else layer.lora_alpha
        return replace(
            layer,
            name=name,
            key_A=f"{name}.lora_down.weight",
            key_B=f"{name}.lora_up.weight",
            key_alpha=f"{name}.alpha",
            lora_alpha=alpha,
            use_rslora=False,
        )
    name = module if form == PEFT else f"{component}.{module}"
    start = PREFIX if form == PEFT else ""
    key_A, key_B = (f"{start}{name}.lora_{half}.weight" for half in "AB")
    return replace(layer, name=name, key_A=key_A, key_B=key_B, key_alpha=None)
