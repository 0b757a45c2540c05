"""Optimizer state of bitsandbytes' Adam and AdamW, read and written under torch's names.

Large moments have 8 bits per value and a scale per block of values; small ones are in float32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_BLOCK = 256
"""Values per scale, a constant of bitsandbytes' optimizers."""

_NUMBERS = {"exp_avg": "1", "exp_avg_sq": "2"}


def is_bitsandbytes(optimizer: object) -> bool:
    """Return whether an optimizer is one of bitsandbytes' Adam and AdamW of any precision."""
    kind = type(optimizer)
    adam = kind.__name__.removeprefix("Paged").startswith("Adam")
    return adam and kind.__module__ in ("bitsandbytes.optim.adam", "bitsandbytes.optim.adamw")


def read_moments(optimizer: Any, parameter: Parameter) -> dict[str, Tensor]:
    """Return a parameter's moments in float32, and its step count; empty before its first step."""
    from bitsandbytes.functional import dequantize_blockwise

    state = optimizer.state.get(parameter)
    if not state:
        return {}
    found = {"step": torch.tensor(float(state["step"]))}
    for key, number in _NUMBERS.items():
        moment = state[f"state{number}"].to(parameter.device)  # paged ones are in the CPU's memory
        if moment.dtype == torch.uint8:
            scales, code = state[f"absmax{number}"], state[f"qmap{number}"]
            moment = dequantize_blockwise(moment, absmax=scales, code=code, blocksize=_BLOCK)
        found[key] = moment
    return found


def write_moments(optimizer: Any, parameter: Parameter, moments: Mapping[str, Tensor]) -> None:
    """Write moments of the parameter's shape, in the precision of its present size."""
    from bitsandbytes.functional import quantize_blockwise

    group, place = _place_of(optimizer, parameter)
    optimizer.state[parameter] = {}
    optimizer.init_state(optimizer.param_groups[group], parameter, group, place)
    state = optimizer.state[parameter]
    state["step"] = int(moments["step"])
    for key, number in _NUMBERS.items():
        values, target = moments[key], state[f"state{number}"]
        if target.dtype == torch.uint8:
            code = state[f"qmap{number}"]
            values, scales = quantize_blockwise(values.contiguous(), code=code, blocksize=_BLOCK)
            state[f"absmax{number}"].copy_(scales.absmax)
        target.copy_(values)


def _place_of(optimizer: Any, parameter: Parameter) -> tuple[int, int]:
    """Return the indices of a parameter's group, and of the parameter in it."""
    return next(
        (group_place, place)
        for group_place, group in enumerate(optimizer.param_groups)
        for place, held in enumerate(group["params"])
        if held is parameter
    )
