"""Combine adapters of one base model, with any ranks, patterns and target modules, into one."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynlora.adapter_files.adapter import SavedAdapter, StoredLayers, match_layers
from dynlora.adapter_files.checks import check_equal, check_finite
from dynlora.adapter_files.formats import PEFT
from dynlora.adapter_files.layer import SavedLayer, find_components
from dynlora.errors import AdapterError

SPARSE = {"ties": "ties", "dare": "dare_linear", "dare-ties": "dare_ties"}
"""Functions of `peft.utils.merge_utils`, by method."""
EQUAL = ("layer_replication", "lora_bias", "trainable_token_indices")
"""Fields of `LoraConfig` that must be equal, because other tensors depend on them."""
FROZEN = ".base_layer."  # in names of frozen weights, which PEFT saves with adapted embeddings
MORE = 32  # directions of a randomized SVD beyond those to keep
OVERFLOW = ("the combined adapter", "scale down its factors, `lora_alpha` or `--weights`")


def combine(adapters: Sequence[SavedAdapter], weights: Sequence[float]) -> SavedAdapter:
    """Return the adapter whose update is the weighted sum of all updates.

    The sum is exact: factors are concatenated, so ranks add up. A layer that an adapter lacks
    counts as zero. Other tensors, such as a classifier's, are averaged with the same weights,
    divided by their sum. `[1 / n] * n` averages n adapters. Layers are made at each access.

    Raises `AdapterError` if shapes or settings differ, only some adapters have a tensor that is not
    of a LoRA layer, the weights add up to 0 and there is such a tensor, or a weighted factor is not
    finite.
    """
    names, read = match_layers(adapters)
    outline = _outline(adapters, weights, names)
    return outline.with_layers(StoredLayers(lambda name: _sum_of(read(name), weights), names))


@torch.no_grad()
def combine_sparse(
    adapters: Sequence[SavedAdapter],
    weights: Sequence[float],
    *,
    method: str,
    density: float,
    rank: int,
) -> tuple[SavedAdapter, dict[str, float]]:
    """Combine dense updates by TIES or DARE, one layer at a time, and cut each to a rank.

    Missing layers and other tensors count as in `combine`, which also lists the errors. `method` is
    a key of `SPARSE`. TIES averages updates of the same sign, so weights of 1 give a mean; DARE
    adds updates. `density`, in ``(0, 1)``, is the share of elements to keep of each update: the
    largest for TIES, random ones with a fixed seed for DARE.

    Returns the adapter in float32, and the kept share of energy by layer, in ``[0, 1]``.

    Reference:
        `add_weighted_adapter` of PEFT 0.21: `ties_svd`, `dare_linear_svd` and `dare_ties_svd`.
    """
    from peft.utils import merge_utils  # takes seconds

    mix = getattr(merge_utils, SPARSE[method])
    names, read = match_layers(adapters)
    outline = _outline(adapters, weights, names)
    layers, kept = [], {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in names:
            pairs = zip(read(name), weights, strict=True)
            held = [(layer, weight) for layer, weight in pairs if layer]
            factors = torch.tensor([weight for _, weight in held])
            dense = [_dense(layer) for layer, _ in held]
            update, bias = (mix(tensors, factors, density) for tensors in zip(*dense, strict=True))
            energy = update.double().square().sum()
            check_finite({name: energy.sqrt().float()}, *OVERFLOW)
            parts = find_components(_approximate(held[0][0], update, rank + MORE))
            made = parts.cut(rank)
            layers.append(made if made.bias is None else replace(made, bias=bias))
            kept[name] = math.fsum(parts.energies[:rank]) / float(energy) if energy else 1.0
    return outline.with_layers(layers), kept


def _dense(layer: SavedLayer) -> tuple[Tensor, Tensor]:
    """Return what a layer adds to the weight and to the bias, in float32."""
    bias = torch.zeros(layer.outputs) if layer.bias is None else layer.bias.float()
    return layer.scaling * (layer.B.float() @ layer.A.float()), layer.scaling * bias


def _approximate(layer: SavedLayer, update: Tensor, rank: int) -> SavedLayer:
    """Return a layer with a randomized SVD of another update, exact at the update's full rank."""
    peak = update.abs().max().clamp(min=torch.finfo(update.dtype).tiny)  # keeps squares finite
    U, S, V = torch.svd_lowrank(update / peak, q=min(rank, *update.shape), niter=4)
    return replace(
        layer,
        lora_A=V.T.reshape(len(S), *layer.lora_A.shape[1:]),
        lora_B=(U * S * peak).reshape(layer.outputs, len(S), *layer.lora_B.shape[2:]),
        lora_alpha=float(len(S)),
        use_rslora=False,
    )


def _sum_of(layers: Sequence[SavedLayer | None], weights: Sequence[float]) -> SavedLayer:
    """Return the weighted sum of a layer's updates as one layer with a scaling of 1."""
    parts = [
        replace(layer, lora_alpha=weight * layer.lora_alpha).at_rank(layer.r)
        for layer, weight in zip(layers, weights, strict=True)
        if layer is not None
    ]
    kinds = {part.lora_A.dtype for part in parts}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float32
    biases = [part.bias.to(dtype) for part in parts if part.bias is not None]
    made = replace(
        parts[0],
        lora_A=torch.cat([part.lora_A.to(dtype) for part in parts]),
        lora_B=torch.cat([part.lora_B.to(dtype) for part in parts], dim=1),
        bias=torch.stack(biases).sum(0) if biases else None,
        lora_alpha=float(sum(part.r for part in parts)),
    )
    check_finite({made.key_B: made.lora_B}, *OVERFLOW)
    return made


def _outline(
    adapters: Sequence[SavedAdapter], weights: Sequence[float], names: Sequence[str]
) -> SavedAdapter:
    """Return the combined adapter of the named layers, still with the layers of the first one."""
    first, folders = adapters[0], [adapter.folder for adapter in adapters]
    check_equal("format", [adapter.form for adapter in adapters], folders)
    for key in EQUAL:
        values = [adapter.config.get(key) or None for adapter in adapters]
        check_equal(f"value of `{key}`", values, folders)
    config = dict(first.config)
    if first.form == PEFT and len(names) > len(first.layers):
        narrower = ("exclude_modules", "layers_to_transform", "layers_pattern")
        config |= {"target_modules": list(names), **dict.fromkeys(narrower)}
    return replace(first, config=config, others=_average_others(adapters, weights))


def _average_others(
    adapters: Sequence[SavedAdapter], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the weighted mean of each tensor that belongs to no LoRA layer."""
    found = {}
    for key in sorted(set().union(*(adapter.others for adapter in adapters))):
        held = [
            (adapter, weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if key in adapter.others or FROZEN not in key
        ]
        shapes = [tuple(a.others[key].shape) if key in a.others else None for a, _ in held]
        check_equal(f"shape of {key!r}", shapes, [adapter.folder for adapter, _ in held])
        total = sum(weight for _, weight in held)
        if total == 0:
            raise AdapterError(
                f"`--weights` must not add up to 0, but got {list(weights)}, and {key!r} is "
                "averaged with them. Use other weights."
            )
        parts = [weight / total * adapter.others[key].double() for adapter, weight in held]
        found[key] = torch.stack(parts).sum(0).to(held[0][0].others[key].dtype)
    return found
