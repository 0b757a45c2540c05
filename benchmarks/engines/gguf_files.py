"""GGUF files for llama.cpp: an F32 copy of a quantised model, and a LoRA adapter.

llama.cpp has scripts for both, in no package. These functions support the Llama architecture. Its
GGUF form orders the rows of q_proj and k_proj differently from Hugging Face (rotary pairs side by
side instead of in two halves), and their `lora_B` must have the same order.
"""

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

LORA_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""Modules whose rows are permuted, with the configuration's key for their number of heads."""
WRITTEN_BY_WRITER = ("GGUF.", "general.architecture", "general.file_type")
"""Fields that the writer sets itself or that must differ in the copy."""


def dequantize_gguf(source: Path, target: Path) -> None:
    """Copy a GGUF with every tensor in float32; metadata, tokenizer included, stays.

    Args:
        source: GGUF in any format that the `gguf` package can dequantise.
        target: File to write.
    """
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, field in reader.fields.items():
        if not name.startswith(WRITTEN_BY_WRITER):
            inner = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    _finish(writer)


def write_lora_gguf(adapter: Path, model: Path, target: Path) -> None:
    """Write a PEFT LoRA adapter of a Llama model as a GGUF adapter.

    llama.cpp scales every layer by `lora_alpha` over that layer's own rank and reads no pattern,
    so the adapter must be in the `uniform` format for the result to be right.

    Args:
        adapter: Folder with adapter_config.json and adapter_model.safetensors.
        model: Folder with the base model's config.json.
        target: File to write.

    Raises:
        ValueError: If the base model is no Llama, or a tensor is no LoRA matrix of a known layer.
    """
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(
            f"The base model must be a Llama, whose row order this writer knows, got "
            f"{config['model_type']!r} in {model}."
        )
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        match = LORA_KEY.match(key)
        base = match and names.get_name(match["module"])
        if not match or not base:
            raise ValueError(
                f"Every tensor of the adapter must be a lora_A or lora_B of a Llama layer, got "
                f"{key!r} in {adapter}."
            )
        heads = config.get(HEADS.get(match["module"].rpartition(".")[2], ""))
        permuted = match["side"] == "B" and heads is not None
        values = permute_rows(tensor, heads=heads) if permuted else tensor
        name = f"{base}.weight.lora_{match['side'].lower()}"
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    _finish(writer)


def permute_rows(weight: np.ndarray, *, heads: int) -> np.ndarray:
    """Return the rows of a q or k projection in llama.cpp's order.

    Within each head, rows i and i + d/2 (a rotary pair in Hugging Face's order) become 2i, 2i + 1.

    Args:
        weight: Matrix of (heads x head size) rows, and any number of columns.
        heads: Number of heads that the rows belong to.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
