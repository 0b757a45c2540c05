"""Load models with linear layers in 4 or 8 bits, quantized by bitsandbytes."""

from collections.abc import Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig

from dynlora.adapter_files.base_models import NO_CODE, load_weights
from dynlora.engines.checks import keep_gradients
from dynlora.errors import ConfigError


def check_quantizer(quantization: str) -> None:
    """Check that bitsandbytes is installed."""
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
    whole: Sequence[str] = (),
) -> tuple[Any, frozenset[str]]:
    """Return a quantized model, and the names of its randomly initialized weights.

    `nf4` is as in QLoRA (Dettmers and others 2023, arXiv 2305.14314). The head and the modules
    `whole` stay unquantized. A GGUF file is first dequantized to a temporary folder, because it has
    its own quantization. Call `make_trainable` before adding an adapter.
    """
    if quantization == "int8":
        precision: dict[str, Any] = {"load_in_8bit": True}
    else:
        precision = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": getattr(torch, options["dtype"]),
        }

    def bits(shape: Any) -> dict[str, Any]:
        names = _unquantized_modules(shape, whole)
        settings: Any = BitsAndBytesConfig(llm_int8_skip_modules=names, **precision)  # type: ignore[no-untyped-call]
        return {"quantization_config": settings}

    if "gguf_file" in source_options:
        with TemporaryDirectory() as folder:
            restored, drawn = load_weights(auto_class, place, **source_options, **options)
            restored.save_pretrained(folder)
            model, _ = load_weights(auto_class, folder, **options | bits(restored))
    else:
        with torch.device("meta"):  # only the module names are needed
            config = AutoConfig.from_pretrained(place, **source_options)
            shape = auto_class.from_config(config, **NO_CODE)
        how = source_options | options | bits(shape)
        model, drawn = load_weights(auto_class, place, **how)
    return model, drawn


def _unquantized_modules(model: Any, more: Sequence[str]) -> list[str] | None:
    """Return the names of the modules to leave unquantized: the head, and `more`.

    transformers, which chooses for None, would choose the module with the model's last weight, and
    misses heads with bias.
    """
    names = [name for name, _ in model.named_children()]
    if model.base_model_prefix not in names:
        return list(more) or None
    return [*(name for name in names if name != model.base_model_prefix), *more]


def make_trainable(model: Any) -> Any:
    """Prepare a loaded quantized model for an adapter."""
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # Otherwise the evaluation before training would repack weights for inference only.
    keep_gradients(prepared)
    return prepared
