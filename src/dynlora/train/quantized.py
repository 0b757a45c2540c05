"""Loading a model whose linear layers bitsandbytes holds in 4 or 8 bits."""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig

from dynlora.adapters.quantised import keep_gradients
from dynlora.base_models import NO_CODE, load_weights
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
    whole: Sequence[str] = (),
) -> tuple[Any, frozenset[str]]:
    """Return a quantized model, and the names of its weights that are newly drawn.

    Before an adapter is added it must be made ready: see `make_trainable`.

    A GGUF file is held in a quantization of its own: its weights are first restored and written
    to a temporary folder.

    Args:
        auto_class: One of transformers' classes.
        place: Folder or hub name.
        quantization: `nf4` or `int8`.
        source_options: Of every `from_pretrained`; with `gguf_file` for a model in such a file.
        options: Further arguments of the model's `from_pretrained`, `dtype` among them.
        whole: Names of modules that are not quantized beside the head.

    Raises:
        OSError: If files are missing or the temporary folder cannot be written.
        UNLOADABLE: If the model cannot be loaded.
    """
    bits = partial(bits_and_bytes, quantization, options["dtype"])
    if "gguf_file" in source_options:
        with TemporaryDirectory() as folder:
            restored, drawn = load_weights(auto_class, place, **source_options, **options)
            restored.save_pretrained(folder)
            how = {"quantization_config": bits(unquantized_modules(restored, whole))}
            model, _ = load_weights(auto_class, folder, **options | how)
    else:
        with torch.device("meta"):  # of this model only the names of its modules are needed
            config = AutoConfig.from_pretrained(place, **source_options)
            shape = auto_class.from_config(config, **NO_CODE)
        how = {"quantization_config": bits(unquantized_modules(shape, whole))}
        model, drawn = load_weights(auto_class, place, **source_options, **options | how)
    return model, drawn


def make_trainable(model: Any) -> Any:
    """Return a quantized model ready for an adapter, all its weights having been loaded."""
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # An evaluation comes before training, and must not repack weights for inference alone.
    keep_gradients(prepared)
    return prepared


def unquantized_modules(model: Any, more: Sequence[str]) -> list[str] | None:
    """Return the names of the modules beside the pretrained part, and more, to leave as they are.

    They are the language model's head, or one that is trained whole. transformers takes for the
    head what holds the last weight of a model, and no head that ends with a bias.

    Returns:
        The names; None leaves the choice to transformers where no part is named as pretrained.
    """
    names = [name for name, _ in model.named_children()]
    if model.base_model_prefix not in names:
        return list(more) or None
    return [*(name for name in names if name != model.base_model_prefix), *more]


def bits_and_bytes(quantization: str, dtype: str, whole: list[str] | None) -> BitsAndBytesConfig:
    """Return bitsandbytes' settings: NF4 as in QLoRA, or 8 bits with its usual threshold.

    Args:
        quantization: `nf4` or `int8`.
        dtype: What is computed in.
        whole: Modules that are not quantized; None for those that transformers finds.

    Reference:
        Dettmers and others 2023, "QLoRA", arXiv 2305.14314.
    """
    if quantization == "int8":
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_8bit=True, llm_int8_skip_modules=whole
        )
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        llm_int8_skip_modules=whole,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
