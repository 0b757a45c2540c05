"""Loading a model whose linear layers bitsandbytes holds in 4 or 8 bits."""

from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoConfig, BitsAndBytesConfig

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
    bits = partial(bits_and_bytes, quantization, options["dtype"])
    if not source_options:
        with torch.device("meta"):  # of this model only the names of its modules are needed
            shape = auto_class.from_config(AutoConfig.from_pretrained(place))
        how = {"quantization_config": bits(outer_modules(shape))}
        model = auto_class.from_pretrained(place, **options | how)
    else:
        with TemporaryDirectory() as folder:
            whole = auto_class.from_pretrained(place, **source_options, **options)
            whole.save_pretrained(folder)
            how = {"quantization_config": bits(outer_modules(whole))}
            model = auto_class.from_pretrained(folder, **options | how)
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # An evaluation comes before training, and must not repack weights for inference alone.
    keep_gradients(prepared)
    return prepared


def outer_modules(model: Any) -> list[str] | None:
    """Return the names of the modules beside the pretrained part, which must not be quantized.

    They are the language model's head, or one that is trained whole. transformers takes for the
    head what holds the last weight of a model, and no head that ends with a bias.

    Returns:
        The names; None leaves the choice to transformers where no part is named as pretrained.
    """
    names = [name for name, _ in model.named_children()]
    if model.base_model_prefix not in names:
        return None
    return [name for name in names if name != model.base_model_prefix]


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
