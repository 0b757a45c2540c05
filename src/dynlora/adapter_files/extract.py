"""Extract a LoRA adapter from a full fine-tune: the folders of two models in, an adapter out.

Weights are read tensor by tensor. A randomized SVD reduces each change to its strongest directions
(Halko, Martinsson and Tropp 2011, arXiv 0909.4061).
"""

import math
from collections import ChainMap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.adapter_base import FORMS, model_class, tied_weights
from dynlora.adapter_files.base_models import NO_CODE, UNLOADABLE
from dynlora.adapter_files.checks import check_finite
from dynlora.adapter_files.formats import PREFIX
from dynlora.adapter_files.layer import SavedLayer, find_components
from dynlora.adapter_files.names import natural_key
from dynlora.adapter_files.resize import lowest_rank
from dynlora.adapter_files.tensor_file import TensorFile
from dynlora.errors import AdapterError
from dynlora.files.plain_values import parse_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MORE = 8  # directions to compute beyond those to keep, for accuracy
PASSES = 2  # power iterations
SEED = 0
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT's tasks with a head of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class Extracted:
    """An adapter with the strongest directions of each changed weight."""

    adapter: SavedAdapter
    energies: Mapping[str, float]  # squared Frobenius norm of each layer's whole change, by name
    left_out: Mapping[str, float]
    """Changed tensors that no LoRA layer represents, such as biases: norm of the change relative to
    the norm of the tensor, by name."""

    def lost(self, layer: SavedLayer, rank: int) -> float:
        """Return the norm of a layer's lost change at a rank, relative to the whole change's."""
        kept = math.fsum(find_components(layer).energies[:rank])
        return math.sqrt(max(0.0, 1 - kept / self.energies[layer.name]))

    def plan_error(self, error: float) -> dict[str, int]:
        """Return the lowest rank per layer that loses at most `error`, or the layer's highest."""
        ranks = {}
        for layer in self.adapter.layers:
            energies, whole = find_components(layer).energies, self.energies[layer.name]
            unseen = max(0.0, whole - math.fsum(energies))
            ranks[layer.name] = lowest_rank(energies, error**2 * whole - unseen)
        return ranks


@torch.no_grad()
def extract(base: Path, tuned: Path, rank: int = 64) -> Extracted:
    """Return the adapter that turns one model into another, with at most `rank` per layer.

    Linear layers, `Conv1D` and embeddings whose weights differ get LoRA layers. Modules that only
    the tuned model has, such as a classifier, are saved whole. Besides the adapter, one weight is
    in memory at a time. Raises `AdapterError` if a folder has no model in safetensors, or the
    models are equal or of unlike architectures.
    """
    before, after, shape = _open_model(base), _open_model(tuned), _outline(tuned)
    modules = dict(shape.named_modules())
    inner = f"{shape.base_model_prefix}."  # files of a model without a head lack it
    heads = {form.removeprefix("AutoModel"): task for task, form in FORMS.items()}
    task = next((heads[end] for end in heads if end and type(shape).__name__.endswith(end)), None)
    tied = tied_weights(shape)
    layers: list[SavedLayer] = []
    energies: dict[str, float] = {}
    left_out: dict[str, float] = {}
    whole: dict[str, Tensor] = {}
    for key in sorted(after, key=natural_key):
        twin = next((k for k in (key, key.removeprefix(inner), inner + key) if k in before), None)
        # PEFT saves classifiers whole.
        if twin is None or (task in HEADED and not key.startswith(inner)):
            whole[key] = after[key]
            continue
        name, _, kind = key.rpartition(".")
        most = rank if kind == "weight" and _fits_lora(modules.get(name)) else 0
        # No name holds the change, so that it is freed before the next one is made.
        norm, factors = _reduce(_change(before[twin], after[key], key, tuned), most)
        if factors:
            left, right = (part.to(after[key].dtype) for part in factors)
            # PEFT's layer of a module does not reach others with the same weight.
            for other in tied[key]:
                if other != key and other in after:
                    continue
                place = other.removesuffix(".weight")
                layers.append(_layer(place, modules[place], left, right))
                energies[place] = norm**2
        elif norm:
            left_out[key] = norm / float(after[key].float().norm())
    if not layers:
        raise AdapterError(
            f"at least one layer of {tuned} must differ from {base}, but got equal weights. Give "
            "the folder of the base model first, then that of the tuned model."
        )
    parameters = tied.keys()
    homes = _homes(parameters, whole)
    kept = {home for key, home in homes.items() if home and key in parameters}
    left_out |= {key: 1.0 for key, home in homes.items() if not home and key in parameters}
    others = {PREFIX + key: tensor for key, tensor in whole.items() if homes[key] in kept}
    config = LoraConfig(
        task_type=task,
        base_model_name_or_path=str(base),
        target_modules=[layer.name for layer in layers],
        modules_to_save=sorted(kept) or None,
        fan_in_fan_out=any(isinstance(modules[layer.name], Conv1D) for layer in layers),
    )
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    adapter = SavedAdapter(folder=tuned, config=plain, layers=layers, others=others)
    return Extracted(adapter=adapter.with_layers(layers), energies=energies, left_out=left_out)


def _open_model(folder: Path) -> Mapping[str, Tensor]:
    """Return a model's weights by name, read at each access."""
    index, names = folder / INDEX, [WEIGHTS]
    try:
        if index.is_file():
            shards = parse_json(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({Path(name).name for name in shards.values()})
        return ChainMap(*(TensorFile(folder / name) for name in names))  # type: ignore[arg-type]
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        raise AdapterError(
            f"a model must be a folder with {WEIGHTS} or its shards, but got {folder}: {error}. "
            "Save the model with safetensors."
        ) from error


def _outline(folder: Path) -> Any:
    """Return the model of a folder without weights."""
    try:
        config = AutoConfig.from_pretrained(folder, **NO_CODE)
        with torch.device("meta"):
            return model_class(None, config, str(folder))(config)
    except UNLOADABLE as error:
        raise AdapterError(f"the model in {folder} could not be read: {error}") from error


def _homes(parameters: Collection[str], new: Collection[str]) -> dict[str, str]:
    """Return the topmost module that has only new parameters by new name; empty if none has."""
    above = {
        name: list(accumulate(name.split(".")[:-1], "{}.{}".format)) for name in {*parameters, *new}
    }
    mixed = {module for name in parameters if name not in new for module in above[name]}
    return {name: next((m for m in above[name] if m not in mixed), "") for name in new}


def _fits_lora(module: Any) -> bool:
    """Return whether PEFT's LoRA follows the module's forward; BART embeds positions otherwise."""
    if isinstance(module, nn.Embedding):
        return type(module) is nn.Embedding or hasattr(module, "embed_scale")
    return isinstance(module, (nn.Linear, Conv1D))


def _change(before: Tensor, after: Tensor, key: str, tuned: Path) -> Tensor:
    """Return the difference of two weights in float32."""
    if before.shape != after.shape:
        raise AdapterError(
            f"both models must have the same shapes, but got {tuple(after.shape)} instead of "
            f"{tuple(before.shape)} for {key!r} in {tuned}. Give models of one architecture and "
            "vocabulary."
        )
    change = after.to(torch.float32, copy=True).sub_(before)
    check_finite({key: change}, str(tuned), "or the base model's; its training diverged")
    return change


def _reduce(
    change: Tensor, rank: int
) -> tuple[float, tuple[Float[Tensor, "rows r"], Float[Tensor, "columns r"]] | None]:
    """Return a change's norm, and factors of equal norms of its strongest directions.

    No factors if the rank or the norm is 0.
    """
    norm = float(change.norm())
    if not (rank and norm):
        return norm, None
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        U, S, V = torch.svd_lowrank(change, q=min(rank + MORE, *change.shape), niter=PASSES)
    roots = S[S > 0][:rank].sqrt()
    return norm, (U[:, : len(roots)] * roots, V[:, : len(roots)] * roots)


def _layer(
    name: str, module: Any, left: Float[Tensor, "rows r"], right: Float[Tensor, "columns r"]
) -> SavedLayer:
    """Return the layer whose update of the module's weight is ``left @ right.T``."""
    plain, ids = isinstance(module, nn.Linear), isinstance(module, nn.Embedding)
    A, B = (right.T, left) if plain else (left.T, right)  # others have transposed weights
    return SavedLayer(
        name=name,
        key_A=f"{PREFIX}{name}.lora_embedding_A" if ids else f"{PREFIX}{name}.lora_A.weight",
        key_B=f"{PREFIX}{name}.lora_embedding_B" if ids else f"{PREFIX}{name}.lora_B.weight",
        lora_A=A,
        lora_B=B,
        lora_alpha=float(len(A)),
        use_rslora=False,
    )
