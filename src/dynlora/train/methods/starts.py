"""Initial adapter weights from the base model (PiSSA, OLoRA) or the data (EVA), found by PEFT.

PiSSA and OLoRA train on a base model without the adapter's initial part. PEFT converts the trained
adapter to a plain one for the original model, of twice the rank.
"""

import io
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.eva import get_eva_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from dynlora.adapter_files.formats import PREFIX
from dynlora.adapters.patterns import changes_base
from dynlora.errors import ConfigError
from dynlora.train.config import LoraSettings

Factors = Mapping[str, Tensor]  # weights of an adapter, by name in its file
PATIENCE = 3
"""Maximum passes over the training data for EVA to converge, of at least 100 batches each."""


def takes_from_base(lora: LoraSettings) -> bool:
    """Return whether a new adapter is initialized with part of the base model's weights."""
    return lora.start_from is None and changes_base(lora.init_lora_weights)


def uses_eva(lora: LoraSettings) -> bool:
    """Return whether a new adapter is initialized with directions of the training data's inputs."""
    return lora.start_from is None and lora.init_lora_weights == "eva"


def first_factors(model: Any, start: str) -> Factors:
    """Return copies of the weights of a new adapter, initialized from the base weights."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name, base = path.removeprefix(PREFIX), layer.get_base_layer()
        if not _is_initialized(layer, start):
            raise ConfigError(
                f"`lora.init_lora_weights: {start}` needs linear layers with at least "
                f"lora.r={layer.r['default']} inputs and outputs, got {name!r} of type "
                f"{type(base).__name__} with weight {tuple(base.weight.shape)}: lower `lora.r`, "
                "leave the layer out of `lora.target_modules`, or use another start."
            )
        if uses[id(base.weight)] > 1:
            raise ConfigError(
                f"`lora.init_lora_weights: {start}` needs layers with weights of their own, got "
                f"{name!r}, whose weight another module uses too: leave it out of "
                "`lora.target_modules`, or use another start."
            )
    return {name: tensor.clone() for name, tensor in _weights(model).items()}


def _is_initialized(layer: LoraLayer, start: str) -> bool:
    """Return whether PEFT applied the initialization to a layer."""
    if "default" not in layer.lora_A:
        return False  # embeddings keep the default initialization
    if start == "olora" and layer.fan_in_fan_out:
        return False  # peft 0.21 ignores that the weight is transposed
    return bool(layer.lora_A["default"].weight.shape == (layer.r["default"], layer.in_features))


def write_difference(model: Any, first: Factors, output: Path) -> None:
    """Save the adapter, trained from the weights `first`, as a plain one for the original model."""
    with TemporaryDirectory() as place, warnings.catch_warnings():
        initial = Path(place) / "initial"
        initial.mkdir()
        save_file(dict(first), initial / SAFETENSORS_WEIGHTS_NAME)
        # PEFT looks for a config.json to detect a changed vocabulary.
        warnings.filterwarnings("ignore", r"Could not find a config file in .*\.gguf", UserWarning)
        # PEFT loads the initial weights as a second adapter, and warns of those.
        warnings.filterwarnings("ignore", ".* changes the base weights of the model", UserWarning)
        model.save_pretrained(output, path_initial_model_for_weight_conversion=str(initial))
    # PEFT 0.21 drops the modules trained in full, such as a head, when it converts.
    whole = {name: tensor for name, tensor in _weights(model).items() if ".lora_" not in name}
    path = output / SAFETENSORS_WEIGHTS_NAME
    save_file(load_file(path) | whole, path, metadata={"format": "pt"})


def _weights(model: Any) -> dict[str, Tensor]:
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def begin_with_eva(trainer: Any, model: Any) -> None:
    """Set `lora_A` of every layer to the first principal directions of its inputs.

    PEFT computes them from the run's first batches, without labels, and without a redistribution of
    ranks (`rho` 1), which would change the parameter count. EVA skips embeddings and convolutions.

    Reference:
        Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
        arXiv 2410.07170.
    """
    loader = DataLoader(
        trainer.train_dataset,
        batch_size=trainer.args.train_batch_size,
        sampler=trainer.sampler,
        collate_fn=trainer.data_collator,
    )
    r = model.peft_config["default"].r
    most = PATIENCE * max(len(loader), 100)
    batches = count()

    def forward(model: Any, inputs: Mapping[str, Any]) -> None:
        if next(batches) == most:  # PEFT repeats until convergence
            raise ConfigError(
                f"`lora.init_lora_weights: eva` needs inputs that vary in lora.r={r} directions in "
                f"every layer, got none that settle in {most} batches: lower `lora.r`, raise "
                "`training.batch_size`, or leave out layers that see few inputs."
            )
        model(**{k: v for k, v in inputs.items() if k not in ("labels", "completion_mask")})

    with torch.random.fork_rng(), redirect_stdout(io.StringIO()):
        found = get_eva_state_dict(
            model,
            loader,
            LoraConfig(r=r, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)),
            forward_fn=forward,
            prepare_model_inputs_fn=lambda inputs, _config: inputs.get("attention_mask"),
            prepare_layer_inputs_fn=_tokens,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    for name, directions in found.items():
        model.get_submodule(name).lora_A["default"].weight.data.copy_(directions)


def _tokens(layer_inputs: Any, mask: Tensor | None, _name: str) -> Tensor:
    """Return a layer's inputs as rows, without padding if the mask matches their shape."""
    inputs: Tensor = layer_inputs if torch.is_tensor(layer_inputs) else layer_inputs[0]
    if mask is not None and inputs.shape[:-1] == mask.shape:
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()
