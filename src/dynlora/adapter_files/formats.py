"""Names in LoRA adapters: PEFT folders, and single files of kohya and diffusers.

A single file can adapt several components of a diffusion pipeline, so a layer's name begins with
the component. kohya (sd-scripts) also replaces dots by underscores: see `convert.py`.
Without torch, because the command line reads these values before it loads torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

PEFT, KOHYA, DIFFUSERS = "peft", "kohya", "diffusers"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # in a folder of PEFT
PREFIX = "base_model.model."  # of names in PEFT's files
METADATA = "lora_adapter_metadata"  # key of the fields of `LoraConfig` in files of diffusers
HALVES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias"}
PEFT_KEYS = HALVES | {".lora_embedding_A": "A", ".lora_embedding_B": "B"}
FILE_KEYS = HALVES | {
    ".lora_down.weight": "A", ".lora_up.weight": "B", ".alpha": "alpha",
    ".lora.down.weight": "A", ".lora.up.weight": "B",  # of a UNet, from older diffusers
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B",  # text encoders
}  # fmt: skip
"""Endings of the tensors' names, after the layer's name, and their meanings."""
OTHER_METHODS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", ".hada_": "LoHa", ".lokr_": "LoKr",
    "lora_mid": "a factorized convolution", "oft_": "OFT", "bundle_emb": "an embedding",
}  # fmt: skip
"""Parts of the names of tensors that single files may not contain, and what they belong to."""
KOHYA_PREFIXES = {
    "unet": "lora_unet", "transformer": "lora_unet", "text_encoder": "lora_te1",
    "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3",
}  # fmt: skip
"""kohya's prefix per component; see `kohya_name` for pipelines with one text encoder."""
SGM = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
SGM_BLOCK = re.compile(r"(input|middle|output)_blocks?_(\d)_(?:(\d)_)?(.+)")
SGM_KINDS = ("resnets", "attentions")
SGM_PARTS = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
"""Names in SDXL's original UNet, which kohya trains, and in diffusers', with underscores."""


def group_keys(
    keys: Iterable[str], endings: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the tensors' names by layer and meaning, and all other names."""
    layers: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        ending = next((end for end in endings if key.endswith(end)), None)
        name = key.removesuffix(ending or "").removeprefix(PREFIX)
        if ending is None or endings[ending] in layers.get(name, {}):
            others.append(key)
        else:
            layers.setdefault(name, {})[endings[ending]] = key
    return layers, others


def component_of(name: str) -> str:
    """Return the component at the beginning of a layer's name; empty if it has none."""
    first = name.partition(".")[0]
    return first if first in KOHYA_PREFIXES else ""


def prefix_of(component: str) -> str:
    """Return the beginning of the names of a component's layers and fields."""
    return f"{component}." if component else ""


def config_of(fields: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return the fields of one component's `LoraConfig`; empty if it has none."""
    prefix = prefix_of(component)
    return {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}


def kohya_name(component: str, module: str, components: Collection[str]) -> str:
    """Return kohya's name of a layer; `components` are those of the whole file."""
    if component.startswith("text_encoder") and module.startswith("encoder.layers."):
        module = f"text_model.{module}"  # transformers 5 leaves out what CLIP's files have
    one = component == "text_encoder" and set(components) <= {"unet", "text_encoder"}
    prefix = "lora_te" if one else KOHYA_PREFIXES[component]
    return f"{prefix}_{module}".replace(".", "_")


def from_sgm(name: str) -> str:
    """Return the name in diffusers' UNet of a layer of SDXL's original UNet.

    Dots are underscores in both. Other names are returned unchanged.

    Reference: `make_unet_conversion_map` of sd-scripts.
    """
    if (found := SGM_BLOCK.fullmatch(name)) is None or name in SGM:
        return SGM.get(name, name)
    number, part = int(found[2]), SGM_PARTS.get(found[4], found[4])
    if found[1] == "middle":
        return f"mid_block_{SGM_KINDS[number % 2]}_{number // 2}_{part}"
    side, first = {"input": ("down", 1), "output": ("up", 0)}[found[1]]
    block, layer = divmod(number - first, 3)
    inner = f"{SGM_KINDS[int(found[3] or 0) % 2]}_{layer}_{part}"
    return f"{side}_blocks_{block}_{f'{side}samplers_0_conv' if part in ('op', 'conv') else inner}"
