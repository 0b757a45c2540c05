"""Check a saved adapter's configuration and tensors, with errors that name the place."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora.adapters.patterns import LONGEST, changes_base
from dynlora.errors import AdapterError

VARIANTS = {
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRA on single parameters",
    "ensure_weight_tying": "tied adapters",
}
"""Fields of `LoraConfig` that change a layer's update from ``scaling * B @ A`` on its own weight,
with the common name of each variant."""

LARGEST = torch.finfo(torch.float32).max


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Check that a configuration is plain LoRA with valid values.

    Raises:
        AdapterError: If the method or variant differs, or a value has the wrong type or range.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"an adapter must have `peft_type` LORA, got {kind!r} in {where}: this method is not "
            "LoRA."
        )
    for key, name in VARIANTS.items():
        if config.get(key):
            raise AdapterError(
                f"an adapter must be plain LoRA, got {name} (`{key}`) in {where}: its update is "
                "not a product of two factors alone; merge it with PEFT's `merge_and_unload`."
            )
    base = config.get("base_model_name_or_path") or ""
    if type(base) is not str or len(base) > LONGEST:
        raise AdapterError(
            f"`base_model_name_or_path` must be a text of at most {LONGEST} characters, got "
            f"{len(str(base))} in {where}: name the base model's folder."
        )
    start = config.get("init_lora_weights")
    if changes_base(start):
        raise AdapterError(
            f"an adapter must leave its base model as it is, got `init_lora_weights` {start!r} in "
            f"{where}, which changes it: save it again with PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )
    _check_number(config.get("r"), "r", where, whole=True)
    _check_number(config.get("lora_alpha"), "lora_alpha", where, whole=False)
    _check_patterns(config, "rank_pattern", where, whole=True)
    _check_patterns(config, "alpha_pattern", where, whole=False)


def check_factors(
    name: str, A: Tensor, B: Tensor, bias: Tensor | None, *, rank: int, where: str
) -> None:
    """Check that a layer's tensors match each other and the configured rank.

    Args:
        name: Name of the layer.
        A: Its `lora_A`.
        B: Its `lora_B`.
        bias: Bias of `lora_B`, if any.
        rank: Configured rank.
        where: The adapter, for messages.

    Raises:
        AdapterError: If a shape or dtype does not match.
    """
    shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    if min(A.dim(), B.dim()) < 2 or 0 in (*A.shape, *B.shape):
        raise AdapterError(
            f"layer {name!r} must have non-empty factors of two axes or more, got {shapes} in "
            f"{where}: the adapter was saved from sharded weights; gather them before saving."
        )
    if len(A) != B.shape[1] or any(size != 1 for size in B.shape[2:]):
        raise AdapterError(
            f"layer {name!r} must have as many rows in lora_A as columns in lora_B, got {shapes} "
            f"in {where}. (Convolutions in groups are not supported.)"
        )
    if len(A) != rank:
        raise AdapterError(
            f"layer {name!r} must have the rank that adapter_config.json gives it, {rank}, got "
            f"{shapes} in {where}: the two files are not of the same adapter."
        )
    if bias is not None and bias.shape != (len(B),):
        raise AdapterError(
            f"layer {name!r} must have {len(B)} numbers in the bias of lora_B, got shape "
            f"{tuple(bias.shape)} in {where}."
        )
    if not (A.is_floating_point() and B.is_floating_point()) or A.dtype != B.dtype:
        raise AdapterError(
            f"layer {name!r} must have factors of one floating point type, got {A.dtype} and "
            f"{B.dtype} in {where}."
        )


def check_finite(tensors: Mapping[str, Tensor], where: str, advice: str) -> None:
    """Check that every weight is finite.

    Args:
        tensors: Tensors by name.
        where: The adapter, for messages.
        advice: Likely reason and remedy, for messages.

    Raises:
        AdapterError: If a weight is not finite.
    """
    for key, tensor in tensors.items():
        wrong = int((~torch.isfinite(tensor.float())).sum()) if tensor.is_floating_point() else 0
        if wrong:
            raise AdapterError(
                f"every weight must be finite, got {wrong} of {tensor.numel()} that are not in "
                f"{key!r} in {where}: {advice}."
            )


def _check_patterns(config: Mapping[str, Any], key: str, where: str, *, whole: bool) -> None:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"`{key}` must map names to numbers, got {patterns!r} in {where}.")
    for pattern, value in patterns.items():
        _check_number(value, f"{key}[{pattern!r}]", where, whole=whole)


def _check_number(value: Any, key: str, where: str, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not abs(value) <= LARGEST or (whole and value < 1):
        wanted = "a whole number of at least 1" if whole else "a number that float32 holds"
        raise AdapterError(f"`{key}` must be {wanted}, got {value!r} in {where}.")
