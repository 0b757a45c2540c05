"""Optimizer state that follows a change of rank, and the optimizers for which that is exact.

First moments are averages of gradients and follow them exactly (`BasisChange`). Second moments are
averages of squared gradients and follow by the squared entries of the same map, which is exact for
growing, dropping and scaling, and for a rotation ignores the correlation between directions. Then
those are raised that would let the next step exceed one learning rate.

What Adam divides by each other, its moments over their bias corrections, is what is carried. The
number of steps that they stand for is cut to `MEMORY`: a grown direction must not inherit the sizes
that other gradients had at the start of training, or it hardly moves for as long as Adam remembers
them (a thousand steps), and what was learned of the old basis counts for less in the new one.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dynlora.adapters import deepspeed
from dynlora.adapters.deepspeed import AnyOptimizer
from dynlora.adapters.factor import Factor
from dynlora.adapters.sharding import sharded_as, whole
from dynlora.errors import OptimizerError
from dynlora.types import BasisChange

SUPPORTED = ("Adam", "AdamW", "SGD", "Muon")
"""Optimizers of torch whose state follows, by name: older ones lack some."""

RESTARTED = {
    "torch.optim": "Adafactor",
    "transformers.optimization": "Adafactor",
    "bitsandbytes.optim.adam": "Adam",
    "bitsandbytes.optim.adamw": "AdamW",
}
"""By module, beginnings of the names of optimizers whose state does not follow, because it is
factored or quantised: that of a layer which changes starts anew, as on its first step."""

logger = logging.getLogger(__name__)

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")

MEMORY = 10
"""Steps of Adam that the moments stand for after an event, at most: those that its first moment
remembers by default. A grown direction starts with moments of zero; its first step is then half a
learning rate, and would be at most one for any value up to 100."""

_MOMENTUM_SHARE = 0.7
"""Most of one learning rate that momentum alone may take in the first step after an event; the rest
is for that step's gradient, up to three times its usual size with torch's default betas."""


def unwrap_optimizer(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Return the optimizer inside Accelerate's wrapper, checked to be one we can follow.

    DeepSpeed's is one with all that it wraps: see `check_holds`.

    Raises:
        OptimizerError: If its state can neither be resized nor start anew.
    """
    if deepspeed.is_zero(optimizer):
        return optimizer
    # Not whatever is wrapped: Lookahead and others keep tensors of the parameters' shapes.
    wrapped = type(optimizer).__module__.startswith("accelerate.")
    inner: AnyOptimizer = vars(optimizer).get("optimizer", optimizer) if wrapped else optimizer
    kind = type(inner)
    if deepspeed.is_zero(inner):
        return inner
    if _starts_anew(inner):
        logger.warning(
            "the state of %s cannot follow a change of rank: that of a layer which changes starts "
            "anew at each event",
            kind.__name__,
        )
    elif kind not in [getattr(torch.optim, name, None) for name in SUPPORTED]:
        names = ", ".join(f"torch.optim.{name}" for name in SUPPORTED)
        raise OptimizerError(
            f"The optimizer must be one of {names}, an Adafactor or one of bitsandbytes' Adam and "
            f"AdamW, got {kind.__module__}.{kind.__name__}, whose state cannot follow a change of "
            "rank yet: use torch.optim.AdamW."
        )
    return inner


def check_static(optimizer: AnyOptimizer) -> None:
    """Check that the optimizer's steps do not depend on how wide a tensor is held.

    Raises:
        OptimizerError: If they do.
    """
    if type(optimizer).__name__ == "Muon":
        raise OptimizerError(
            "The optimizer must take the same steps whatever rank tensors are held at, got Muon in "
            "static mode, which scales them by the tensors' shapes: use torch.optim.AdamW."
        )


def _starts_anew(optimizer: AnyOptimizer) -> bool:
    kind = type(optimizer)
    begins = RESTARTED.get(kind.__module__)
    return begins is not None and kind.__name__.removeprefix("Paged").startswith(begins)


def check_holds(optimizer: AnyOptimizer, parameters: list[Parameter]) -> None:
    """Check that the optimizer updates every LoRA parameter that is trained.

    Raises:
        OptimizerError: If one is missing, which happens when it was built for another model, or
            DeepSpeed holds it in a way that a change of rank cannot follow.
    """
    if deepspeed.is_zero(optimizer):
        deepspeed.check_zero(optimizer, parameters)
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sum(id(parameter) not in held for parameter in parameters)
    if missing and any(deepspeed.is_copied(parameter) for parameter in parameters):
        raise OptimizerError(
            f"DeepSpeed trains these parameters, but the optimizer is {type(optimizer).__name__}: "
            "give the one that `deepspeed.initialize` or `accelerator.prepare` returned."
        )
    if missing:
        raise OptimizerError(
            f"The optimizer must hold all {len(parameters)} LoRA parameters, got {missing} that it "
            "does not: build it after `get_peft_model`, from the same model's parameters."
        )


@torch.no_grad()
def rebase_state(
    optimizer: AnyOptimizer, change: BasisChange, *, lora_A: Factor, lora_B: Factor, size: int
) -> None:
    """Carry the moments of one layer's two parameters to the new basis.

    A grown direction starts with moments of zero.

    Args:
        optimizer: Holds both parameters.
        change: The change of basis.
        lora_A: Factor before the change, a matrix of shape ``(old, in_features)``.
        lora_B: Factor before the change, a matrix of shape ``(out_features, old)``.
        size: Rank that the tensors have room for after the change.
    """
    if _starts_anew(optimizer):
        if change.scale_ratio == 1:  # a new scale alone leaves every direction what it was
            restart_state(optimizer, (lora_A.parameter, lora_B.parameter))
        return
    old = change.to_A.shape[1]
    maps = ((lora_A, change.to_B.T, 0), (lora_B, change.to_A, 1))
    for factor, to_gradient, rank_axis in maps:
        matrix = change.scale_ratio * to_gradient
        with _state_of(optimizer, factor.parameter) as state:
            for key in _FIRST + _SECOND:
                moment = state.get(key)
                if isinstance(moment, Tensor):
                    rows = factor.live(moment, old).transpose(0, rank_axis)
                    new = _left(matrix if key in _FIRST else matrix.square(), rows)
                    values = factor.padded(new.transpose(0, rank_axis), size)
                    if values.shape == moment.shape:
                        moment.copy_(sharded_as(moment, values))
                    else:
                        state[key] = values
            # A new scale alone leaves every direction what it was, and both moments in proportion.
            if "exp_avg_sq" in state and change.scale_ratio == 1:
                betas = _betas(optimizer, factor.parameter)
                _cut_memory(state, betas)
                _bound_next_step(state, betas)


def restart_state(optimizer: AnyOptimizer, parameters: Iterable[Parameter]) -> None:
    """Forget the state of parameters whose rank has changed, if the optimizer's cannot follow.

    That of the others is fitted by `fit_state`, which sees by the shapes what to do.
    """
    if _starts_anew(optimizer):
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


@torch.no_grad()
def fit_state(optimizer: AnyOptimizer, factors: Sequence[tuple[Factor, int]]) -> int:
    """Give moments the shape of their parameter, or forget them; return how many were forgotten.

    Beyond the live rank they must be zero: Adam would move weights there that nobody counts. They
    fit where they are of the live rank, or have only zeros beyond it: as those of a run whose
    tensors were held otherwise, in one process or in several.

    Args:
        optimizer: Holds the parameters.
        factors: Each with its live rank.
    """
    forgotten = 0
    for factor, rank in factors:
        state = optimizer.state.get(factor.parameter, {})
        moments = {
            key: state[key] for key in _FIRST + _SECOND if isinstance(state.get(key), Tensor)
        }
        fits = all(moment.shape == factor.parameter.shape for moment in moments.values())
        if fits and factor.size == rank:
            continue
        fitted = {key: _fitted(factor, moment, rank) for key, moment in moments.items()}
        if any(moment is None for moment in fitted.values()):
            del optimizer.state[factor.parameter]
            forgotten += 1
        else:
            state.update(fitted)
    return forgotten


def _fitted(factor: Factor, moment: Tensor, rank: int) -> Tensor | None:
    """Return a moment with as many components as the parameter; None if it is of another rank."""
    moment = whole(moment)
    held = moment.shape[factor.rank_axis]
    if held < rank or moment.narrow(factor.rank_axis, rank, held - rank).any():
        return None
    fitted = factor.padded(factor.live(moment, rank), factor.size)
    return sharded_as(factor.parameter, fitted)


def _left(matrix: Tensor, moment: Tensor) -> Tensor:
    return (matrix.double() @ moment.double()).to(moment.dtype)


@contextmanager
def _state_of(optimizer: AnyOptimizer, parameter: Parameter) -> Iterator[dict[str, Any]]:
    """Lend a parameter's state, to be changed."""
    if deepspeed.is_zero(optimizer):
        with deepspeed.state_of(optimizer, parameter) as state:
            yield state
    else:
        yield optimizer.state.get(parameter, {})


def _betas(optimizer: AnyOptimizer, parameter: Parameter) -> tuple[float, float]:
    if deepspeed.is_zero(optimizer):
        groups = [deepspeed.group_of(optimizer, parameter)]
    else:
        groups = optimizer.param_groups
    # A search for each of many parameters would take time with the square of their number.
    if any(group["betas"] != groups[0]["betas"] for group in groups):
        groups = [_group_of(groups, parameter)]
    beta1, beta2 = groups[0]["betas"]
    return float(beta1), float(beta2)


def _group_of(groups: Iterable[dict[str, Any]], parameter: Parameter) -> dict[str, Any]:
    for group in groups:
        if any(p is parameter for p in group["params"]):
            return group
    raise OptimizerError("A LoRA parameter left the optimizer's groups: build the optimizer anew.")


def _cut_memory(state: dict[str, Tensor], betas: tuple[float, float]) -> None:
    """Let the moments stand for `MEMORY` steps at most, at the same bias-corrected values."""
    taken = state["step"].double()  # never read: on a GPU each layer's would be waited for
    left = taken.clamp(max=MEMORY)
    for keys, beta in ((_FIRST, betas[0]), (_SECOND, betas[1])):
        # It may be at 0: fused optimizers take steps back that a gradient scaler has skipped.
        kept = torch.where(taken > left, (1 - beta**left) / (1 - beta**taken), 1.0)
        for key in keys:
            if key in state:
                state[key] *= kept
    state["step"].copy_(left)


def _bound_next_step(state: dict[str, Tensor], betas: tuple[float, float]) -> None:
    """Raise second moments so that momentum leaves room for a gradient within one learning rate.

    Mixing directions can leave a first moment larger than the root of the mixed second one.
    """
    step = state["step"].double()
    ratio = torch.where(step > 0, (1 - betas[1] ** step) / (1 - betas[0] ** step) ** 2, 0.0)
    least = state["exp_avg"].square() * (ratio / _MOMENTUM_SHARE**2)
    for key in _SECOND:
        if key in state:
            state[key] = torch.maximum(state[key], least)
