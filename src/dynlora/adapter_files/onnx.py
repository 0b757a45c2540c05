"""Save a model of texts as ONNX for ONNX Runtime: `input_ids` and `attention_mask` in, logits out.

Batch and length are free. Language models have no cache of keys and values: each call reads all
tokens. The adapter is merged, or in a file of its own, so that a session can switch adapters.
"""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from dynlora.errors import AdapterError, ConfigError

FILE, ADAPTER_FILE = "model.onnx", "adapter.onnx_adapter"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Raise `ConfigError` unless the needed packages are installed."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"ONNX needs the package {missing[0]}, which is not installed: "
            "pip install 'dynlora[onnx]'"
        )


def save_onnx(model: Any, folder: Path) -> None:
    """Write a `PeftModel` with its adapter merged, in float32, to an existing folder.

    Raises `AdapterError` if the model reads anything but texts, or torch cannot export it.
    """
    _export(model.merge_and_unload(safe_merge=True), folder).save(folder / FILE, external_data=True)


def save_onnx_lora(model: Any, folder: Path) -> None:
    """Write the base model with LoRA factors as inputs, and the adapter's factors beside it.

    `model` is a `PeftModel` whose adapter has linear layers alone; its scaling moves into `lora_B`.
    Without an adapter, a session computes the base model. Ranks are free.
    """
    from onnx_ir import Shape, tensor
    from onnxruntime import AdapterFormat, OrtValue

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            B = layer.lora_B["default"].weight
            B.data = B.data.float() * layer.scaling["default"]
            layer.scaling["default"] = 1.0
    base = model.base_model.model
    program = _export(base, folder)
    graph, factors = program.model.graph, {}
    for output in [output for node in graph for output in node.outputs]:
        if output not in graph.outputs:
            output.shape = None  # the exporter's shapes have this adapter's ranks
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            factors[name] = OrtValue.ortvalue_from_numpy(weight.detach().numpy())
            value, shape = graph.initializers[name], list(weight.shape)
            axis = 0 if ".lora_A." in name else 1
            shape[axis] = 1
            value.const_value = tensor(torch.zeros(shape).numpy(), name=name)
            value.shape = Shape(f"rank of {name}" if i == axis else n for i, n in enumerate(shape))
            graph.inputs.append(value)
    program.save(folder / FILE, external_data=True)
    file = AdapterFormat()
    file.set_parameters(factors)
    file.export_adapter(str(folder / ADAPTER_FILE))


def _export(model: Any, folder: Path) -> Any:
    """Return torch's ONNX program of a model in float32, and save the model's configuration."""
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise AdapterError(
            "ONNX export needs a model that reads `input_ids` alone, but got a "
            f"{type(model).__name__}. Use `--format merged`."
        )
    model.config.save_pretrained(folder)
    model.config.use_cache = False
    tokens = torch.ones(2, 3, dtype=torch.long)  # sizes 0 and 1 would become constants
    inputs = {"input_ids": tokens, "attention_mask": tokens.clone()}  # torch would unite equal ones
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names packages that are not needed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model.float().eval(),
                kwargs=inputs,
                dynamic_shapes={key: {0: "batch", 1: "length"} for key in inputs},
                input_names=list(inputs),
                output_names=list(model(**inputs)),
                optimize=False,  # ONNX Runtime does it faster when it loads the model
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"torch could not export the {type(model).__name__} to ONNX: {reason} Use `--format "
            "merged`."
        ) from error
