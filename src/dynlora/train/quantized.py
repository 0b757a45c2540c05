"""Loading a model whose linear layers bitsandbytes holds in 4 or 8 bits."""

from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from dynlora.adapters.quantised import keep_gradients
from dynlora.errors import ConfigError


def check_quantizer(quantization: str) -> None:
    """Check that bitsandbytes is installed.

    Raises:
        ConfigError: If it is not.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`model.quantization: {quantization}` needs the package bitsandbytes, which is not "
            "installed: pip install 'dynlora[quantized]'"
        )


def load_quantized(
    auto_class: Any,
    place: str,
    quantization: str,
    source_options: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Return a quantized model, ready for an adapter.

    A GGUF file is held in a quantization of its own: its weights are first restored and written
    to a temporary folder.

    Args:
        auto_class: One of transformers' classes.
        place: Folder or hub name.
        quantization: `nf4` or `int8`.
        source_options: Of every `from_pretrained`; with `gguf_file` for a model in such a file.
        options: Further arguments of the model's `from_pretrained`, `dtype` among them.

    Raises:
        OSError: If files are missing or the temporary folder cannot be written.
        ValueError: If the model cannot be loaded.
    """
    how = {"quantization_config": bits_and_bytes(quantization, options["dtype"])}
    if not source_options:
        model = auto_class.from_pretrained(place, **options | how)
    else:
        with TemporaryDirectory() as folder:
            auto_class.from_pretrained(place, **source_options, **options).save_pretrained(folder)
            model = auto_class.from_pretrained(folder, **options | how)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # An evaluation comes before training, and must not repack weights for inference alone.
    keep_gradients(prepared)
    return prepared


def bits_and_bytes(quantization: str, dtype: str) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings: NF4 as in QLoRA, or 8 bits with its usual threshold.

    Reference:
        Dettmers and others 2023, "QLoRA", arXiv 2305.14314.
    """
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
