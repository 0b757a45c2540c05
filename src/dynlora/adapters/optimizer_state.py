"""Optimizer state after a change of rank, and the optimizers that support it.

First moments follow a `BasisChange` exactly, second moments by the squared entries of the maps,
which ignores correlations between directions that a rotation mixes (see `docs/method.md`).
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.bitsandbytes_state import is_bitsandbytes, read_moments, write_moments
from dynlora.adapters.factor import Factor
from dynlora.adapters.layers import LoraView
from dynlora.engines import deepspeed
from dynlora.engines.deepspeed import AnyOptimizer
from dynlora.engines.sharding import is_held, sharded_as
from dynlora.errors import OptimizerError
from dynlora.types import BasisChange

SUPPORTED = ("Adam", "AdamW", "SGD", "Muon")
"""Names of torch's optimizers whose state follows; older versions of torch lack some."""

RESTARTED = ("torch.optim.Adafactor", "transformers.optimization.Adafactor")
"""Optimizers whose state is factored and cannot follow: that of a resized layer restarts."""

logger = logging.getLogger(__name__)

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")

MEMORY = 10
"""Most steps that Adam's moments represent after an event: the memory of its first moment by
default. A grown direction starts with zero moments, because large second moments from early
training would slow it for a thousand steps. Its first step is then half a learning rate, and at
most one for any value up to 100."""

_MOMENTUM_SHARE = 0.7
"""Largest part of a learning rate that momentum alone may use in the first step after an event. The
rest is for that step's gradient, up to three times its usual size with torch's default betas."""


def unwrap_optimizer(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Return the optimizer inside Accelerate's wrapper, and check that it is supported."""
    # Other wrappers, such as Lookahead, keep tensors of the parameters' shapes.
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
    elif not is_bitsandbytes(inner) and kind not in [
        getattr(torch.optim, name, None) for name in SUPPORTED
    ]:
        names = ", ".join(f"torch.optim.{name}" for name in SUPPORTED)
        raise OptimizerError(
            f"The optimizer must be one of {names}, an Adafactor or one of bitsandbytes' Adam and "
            f"AdamW, got {kind.__module__}.{kind.__name__}, whose state cannot follow a change of "
            "rank yet: use torch.optim.AdamW."
        )
    return inner


def _starts_anew(optimizer: AnyOptimizer) -> bool:
    kind = type(optimizer)
    return f"{kind.__module__}.{kind.__name__}" in RESTARTED


def check_holds(optimizer: AnyOptimizer, parameters: list[Parameter]) -> None:
    """Raise `OptimizerError` unless the optimizer updates all of these parameters."""
    if deepspeed.is_zero(optimizer):
        deepspeed.check_zero(optimizer, parameters)
        return
    held = deepspeed.trained_by(optimizer)
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
    optimizer: AnyOptimizer,
    change: BasisChange,
    *,
    lora_A: Factor,
    lora_B: Factor,
    bias: Factor | None = None,
) -> None:
    """Map the moments of one layer's resized parameters to the new basis, zero where grown.

    `bias`, which has no rank, follows a change of scale. Under ZeRO this needs
    `deepspeed.unpartitioned`.
    """
    if _starts_anew(optimizer):
        if change.scale_ratio == 1:  # a change of scale keeps directions
            restart_state(optimizer, (lora_A.parameter, lora_B.parameter))
        return
    maps = [(lora_A, change.to_B.mT, -2), (lora_B, change.to_A, -1)]
    if bias is not None:
        maps.append((bias, change.to_A.new_ones(1, 1), -1))
    packed = is_bitsandbytes(optimizer)
    for factor, to_gradient, rank_axis in maps:
        matrix, parameter = change.scale_ratio * to_gradient, factor.parameter
        state = read_moments(optimizer, parameter) if packed else optimizer.state.get(parameter, {})
        for key in _FIRST + _SECOND:
            moment = state.get(key)
            if isinstance(moment, Tensor):
                rows = factor.read(moment).transpose(-2, rank_axis)
                map_ = (matrix if key in _FIRST else matrix.square()).double().to(rows.device)
                new = (map_ @ rows.double()).to(rows.dtype)
                values = factor.from_matrix(new.transpose(-2, rank_axis)).contiguous()
                if values.shape == moment.shape:
                    moment.copy_(sharded_as(moment, values))
                else:
                    state[key] = sharded_as(moment, values)
        # A change of scale keeps directions, and the proportion of both moments.
        if "exp_avg_sq" in state and change.scale_ratio == 1:
            betas = _betas(optimizer, parameter)
            _cut_memory(state, betas)
            _bound_next_step(state, betas)
        if packed and state:
            write_moments(optimizer, parameter, state)


def restart_state(optimizer: AnyOptimizer, parameters: Iterable[Parameter]) -> None:
    """Drop the state of resized parameters if it cannot follow a change of rank."""
    if _starts_anew(optimizer):
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def drop_unfit_state(optimizer: AnyOptimizer, parameters: Sequence[Parameter]) -> int:
    """Drop states with moments of another shape than their parameter's; return their number."""
    unfit = []
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        keys = (*_FIRST, *_SECOND, "state1", "state2")  # the latter are bitsandbytes'
        moments = [state[key] for key in keys if isinstance(state.get(key), Tensor)]
        if any(moment.shape != parameter.shape for moment in moments):
            unfit.append(parameter)
    for parameter in unfit:
        del optimizer.state[parameter]
    return len(unfit)


def _betas(optimizer: AnyOptimizer, parameter: Parameter) -> tuple[float, float]:
    groups = optimizer.param_groups
    # Search only if betas differ, because a search per parameter takes quadratic time.
    if any(group["betas"] != groups[0]["betas"] for group in groups):
        groups = [group for group in groups if any(p is parameter for p in group["params"])]
    beta1, beta2 = groups[0]["betas"]
    return float(beta1), float(beta2)


def _cut_memory(state: dict[str, Tensor], betas: tuple[float, float]) -> None:
    """Cut the step count to `MEMORY`, at equal bias-corrected moments."""
    taken = state["step"].double()  # not read, because that synchronizes with the device
    left = taken.clamp(max=MEMORY)
    for keys, beta in ((_FIRST, betas[0]), (_SECOND, betas[1])):
        # The count may be 0: fused optimizers undo steps that a gradient scaler skipped.
        kept = torch.where(taken > left, (1 - beta**left) / (1 - beta**taken), 1.0)
        for key in keys:
            if key in state:
                state[key] *= kept
    state["step"].copy_(left)


def _bound_next_step(state: dict[str, Tensor], betas: tuple[float, float]) -> None:
    """Raise second moments until momentum alone stays within `_MOMENTUM_SHARE`.

    Mixing directions can leave a first moment larger than the root of the mixed second one.
    """
    step = state["step"].double()
    ratio = torch.where(step > 0, (1 - betas[1] ** step) / (1 - betas[0] ** step) ** 2, 0.0)
    least = state["exp_avg"].square() * (ratio / _MOMENTUM_SHARE**2)
    for key in _SECOND:
        if key in state:
            state[key] = torch.maximum(state[key], least)


class StepWatch:
    """Compares a weight before and after a step, to detect steps of another optimizer.

    Not in every step, because the comparison synchronizes with the device.
    """

    def __init__(self, optimizer: AnyOptimizer, layers: Sequence[LoraView]) -> None:
        self._optimizer = optimizer
        self._layers = layers
        self._stepped = False
        self._before: tuple[LoraView, Tensor] | None = None
        self._handle: RemovableHandle | None = None

    def begin(self) -> None:
        """Copy the first trained weight that no engine manages, before the step."""
        self.close()
        if not isinstance(self._optimizer, Optimizer):
            return
        for layer in self._layers:
            if layer.is_trained and not is_held(layer.factor_B.parameter):
                self._before = layer, layer.lora_B.detach().clone()
                self._handle = self._optimizer.register_step_post_hook(self._note)
                return

    def end(self) -> None:
        """Raise `OptimizerError` if the weight changed without a step of the optimizer."""
        before, stepped = self._before, self._stepped
        self.close()
        if before is None or stepped:
            return
        layer, weight = before
        if not torch.equal(layer.lora_B, weight):
            raise OptimizerError(
                f"The {type(self._optimizer).__name__} that `DynamicLora` was given must take the "
                "steps, for its state follows the ranks, got weights that another has changed: "
                "take the `state_dict()`, attach a new `DynamicLora` with that one, and load it "
                "there."
            )

    def close(self) -> None:
        """Remove the hook and the copy."""
        self._stepped, self._before = False, None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _note(self, *_: Any) -> None:
        self._stepped = True
