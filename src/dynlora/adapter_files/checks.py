"""Check a saved adapter's configuration and tensors, with errors that name the place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
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
    """Check that a configuration is plain LoRA with valid values."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"`peft_type` of an adapter must be LORA, but got {kind!r} in {where}: this method is "
            "not LoRA."
        )
    for key, name in VARIANTS.items():
        if config.get(key):
            raise AdapterError(
                f"an adapter must be plain LoRA, but got {name} (`{key}`) in {where}: its update "
                "is not a product of two factors. Merge it with PEFT's `merge_and_unload`."
            )
    base = config.get("base_model_name_or_path") or ""
    if type(base) is not str or len(base) > LONGEST:
        raise AdapterError(
            f"`base_model_name_or_path` must be a text of at most {LONGEST} characters, but got "
            f"{len(str(base))} in {where}."
        )
    start = config.get("init_lora_weights")
    if changes_base(start):
        raise AdapterError(
            f"an adapter must not change its base model, but got `init_lora_weights` {start!r} in "
            f"{where}, which changes it. Save it again with PEFT's "
            "`path_initial_model_for_weight_conversion`."
        )
    check_number(config.get("r"), "r", where, whole=True)
    check_number(config.get("lora_alpha"), "lora_alpha", where, whole=False)
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(
                f"`{key}` must map names to numbers, but got {patterns!r} in {where}."
            )
        for pattern, value in patterns.items():
            check_number(value, f"{key}[{pattern!r}]", where, whole=whole)


def check_number(value: Any, key: str, where: str, *, whole: bool) -> None:
    """Raise `AdapterError` unless a value is a number in range, and at least 1 if `whole`."""
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not abs(value) <= LARGEST or (whole and value < 1):
        wanted = "a whole number of at least 1" if whole else "a number in the range of float32"
        raise AdapterError(f"`{key}` must be {wanted}, but got {value!r} in {where}.")


def check_factors(
    name: str, A: Tensor, B: Tensor, bias: Tensor | None, *, rank: int | None, where: str
) -> None:
    """Check that a layer's tensors match each other and the configured rank, if there is one."""
    shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    if min(A.dim(), B.dim()) < 2 or 0 in (*A.shape, *B.shape):
        fault = (
            f"non-empty factors of two axes or more, but got {shapes}: the adapter was saved from "
            "sharded weights. Gather them before saving"
        )
    elif len(A) != B.shape[1] or any(size != 1 for size in B.shape[2:]):
        fault = (
            f"as many rows in lora_A as columns in lora_B, but got {shapes} (convolutions in "
            "groups are not supported)"
        )
    elif rank is not None and len(A) != rank:
        fault = (
            f"the rank in its configuration, {rank}, but got {shapes}: the two are from "
            "different adapters"
        )
    elif bias is not None and bias.shape != (len(B),):
        fault = f"{len(B)} numbers in the bias of lora_B, but got shape {tuple(bias.shape)}"
    elif not (A.is_floating_point() and B.is_floating_point()) or A.dtype != B.dtype:
        fault = f"factors of one floating point type, but got {A.dtype} and {B.dtype}"
    else:
        return
    raise AdapterError(f"in {where}, layer {name!r} must have {fault}.")


def check_finite(tensors: Mapping[str, Tensor], where: str, advice: str) -> None:
    """Raise `AdapterError` with place and advice if a weight is not finite."""
    for key, tensor in tensors.items():
        if not _is_finite(tensor):
            wrong = int((~torch.isfinite(tensor.float())).sum())
            raise AdapterError(
                f"every weight must be finite, but got {wrong} of {tensor.numel()} that are not in "
                f"{key!r} in {where}: {advice}."
            )


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, without a copy of the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # float8 cannot be compared
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())


def check_equal(what: str, values: Sequence[object], folders: Sequence[Path]) -> None:
    """Raise `AdapterError` unless the values of all adapters, given by folder, are equal."""
    for value, folder in zip(values, folders, strict=True):
        if value != values[0]:
            raise AdapterError(
                f"adapters must have the same {what}, but got {values[0]} in {folders[0]} and "
                f"{value} in {folder}. Leave one of them out."
            )
