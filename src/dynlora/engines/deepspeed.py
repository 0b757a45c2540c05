"""Parameters of DeepSpeed's ZeRO optimizers, which train float32 copies: read whole, and resize.

All access is collective, because each process has only parts of copies, moments and (at stage 3)
parameters. DeepSpeed has no call for a change of shape, so that its engine builds the optimizer
again. DeepSpeed is imported only if it has marked a parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dynlora.errors import OptimizerError

_STAGES_1_AND_2, _STAGE_3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"


@runtime_checkable
class ZeroOptimizer(Protocol):
    """DeepSpeed's wrapper of an optimizer, which is not a `torch.optim.Optimizer`."""

    optimizer: Optimizer
    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]


AnyOptimizer = Optimizer | ZeroOptimizer


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether stage 3 partitions a parameter, trained or frozen."""
    return hasattr(tensor, "ds_id")


def is_copied(tensor: Tensor) -> bool:
    """Return whether ZeRO trains a float32 copy of a parameter."""
    return hasattr(tensor, "_hp_mapping") or (is_partitioned(tensor) and tensor.requires_grad)


def is_held(parameter: Tensor) -> bool:
    """Return whether ZeRO manages a parameter."""
    return is_partitioned(parameter) or is_copied(parameter)


def is_zero(optimizer: object) -> bool:
    """Return whether an optimizer is DeepSpeed's."""
    return type(optimizer).__module__.startswith("deepspeed.runtime.")


def trained_by(optimizer: AnyOptimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer updates."""
    if is_zero(optimizer):
        return {id(p) for _, owners in _copies(optimizer) for p in owners}
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def shape_of(parameter: Parameter) -> torch.Size:
    """Return the shape of the whole parameter."""
    held: Any = parameter
    shape: torch.Size = held.ds_shape if is_partitioned(parameter) else parameter.shape
    return shape


def whole_copy(parameter: Tensor) -> Tensor:
    """Return the trained copy, or the whole values of a frozen stage 3 parameter."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if is_copied(parameter):
        copy: Tensor = safe_get_full_fp32_param(parameter)
        return copy
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def write(parameter: Parameter, values: Tensor) -> None:
    """Write whole values, present on every process, to the copy and to the parameter."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, values)
    with GatheredParameters([parameter], modifier_rank=0):  # does nothing below stage 3
        parameter.data.copy_(values)


def gradient(parameter: Parameter) -> Tensor | None:
    """Return the gradient reduced over processes; None if missing."""
    from deepspeed.utils import safe_get_full_grad

    if not has_gradient(parameter):
        return None
    found: Tensor = safe_get_full_grad(parameter)
    return found


def has_gradient(parameter: Parameter) -> bool:
    """Return whether there is a gradient, from `engine.backward` until `engine.step`."""
    held: Any = parameter
    if is_partitioned(parameter):
        optimizer = held._z3_optimizer
        place = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        return optimizer.averaged_gradients.get(place) is not None
    mapping = held._hp_mapping
    if mapping is None:  # this process has no part, so that others decide
        return True
    return mapping.gradient_dict.get(mapping.param_group_index) is not None


def call_before_step(optimizer: Any, call: Callable[[], None]) -> Callable[[], None]:
    """Call a function before each step, while gradients exist; return a function to undo this.

    For loops without code between the engine's backward and its step.
    """
    step = optimizer.step

    def observed_step(*args: Any, **kwargs: Any) -> Any:
        call()
        return step(*args, **kwargs)

    optimizer.step = observed_step
    return lambda: delattr(optimizer, "step")


def check_zero(optimizer: Any, parameters: Sequence[Parameter]) -> None:
    """Raise `OptimizerError` unless the moments of these parameters can follow a change of rank."""
    kind = type(optimizer).__name__
    if kind not in (_STAGES_1_AND_2, _STAGE_3) or optimizer.dtype == torch.float16:
        raise OptimizerError(
            "DeepSpeed's optimizer must be that of ZeRO 1, 2 or 3 in float32 or bfloat16, got "
            f"{kind} of {optimizer.dtype}: set `zero_optimization.stage` and no `fp16`."
        )
    inner = type(optimizer.optimizer)
    offloads = optimizer.offload_optimizer if _is_stage_3(optimizer) else optimizer.cpu_offload
    if inner not in (torch.optim.Adam, torch.optim.AdamW) or offloads:
        where = "offloaded" if offloads else "not offloaded"
        raise OptimizerError(
            "Under DeepSpeed the optimizer must be torch.optim.Adam or AdamW where the model is, "
            f"got {inner.__module__}.{inner.__name__}, {where}: give `deepspeed.initialize` one of "
            "them, and leave `optimizer` and `offload_optimizer` out of its configuration."
        )
    trained = trained_by(optimizer)
    missing = sum(id(p) not in trained for p in parameters)
    if missing:
        raise OptimizerError(
            f"DeepSpeed must train all {len(parameters)} LoRA parameters, got {missing} that it "
            "does not: give `deepspeed.initialize` this model, and an optimizer of its parameters."
        )


@contextmanager
def unpartitioned(optimizer: AnyOptimizer) -> Iterator[None]:
    """Make ZeRO's parameters plain within the context, and partition them again afterwards.

    Within, all processes have the whole float32 copies as parameters of any shape, and their
    moments in `optimizer.state`. Does nothing for other optimizers.
    """
    if not is_zero(optimizer):
        yield
        return
    zero: Any = optimizer
    dtypes = _unpartition(zero)
    try:
        yield
    finally:
        _partition(zero, dtypes)


@torch.no_grad()
def _unpartition(zero: Any) -> dict[Any, torch.dtype]:
    """Gather copies and moments, and remove hooks and marks; return parameters and their dtypes."""
    groups: list[list[Any]] = [[] for _ in zero.param_groups]
    whole: dict[Any, tuple[Tensor, dict[str, Tensor]]] = {}
    for place, (copy, owners) in enumerate(_copies(zero)):
        groups[zero.sub_group_to_group_id[place] if _is_stage_3(zero) else place] += owners
        moments = _whole_moments(zero, copy, owners)
        whole |= {p: (whole_copy(p), state) for p, state in zip(owners, moments, strict=True)}
    dtypes = {parameter: parameter.dtype for parameter in whole}
    zero.destroy()
    for module in _engine_of(zero).module.modules():  # these functions call the destroyed hooks
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            vars(module).pop(name, None)
    zero.state.clear()
    for group, owners in zip(zero.param_groups, groups, strict=True):
        group["params"] = owners
    for parameter, (copy, state) in whole.items():
        for mark in ("_hp_mapping", "ds_id"):
            vars(parameter).pop(mark, None)
        parameter.data, parameter.grad = copy, None
        if state:
            zero.state[parameter] = state
    return dtypes


def _whole_moments(zero: Any, copy: Tensor, owners: Sequence[Any]) -> list[dict[str, Tensor]]:
    """Return the state of each parameter of a copy; empty before the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state = zero.state.get(copy, {})
    if not state:
        return [{} for _ in owners]
    _link_moments(zero, copy, owners)
    steps = state["step"].expand(len(owners)).clone()  # of the copy, or of each parameter
    keys = [key for key in state if key != "step"]
    return [
        {"step": step} | {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        for parameter, step in zip(owners, steps, strict=True)
    ]


@torch.no_grad()
def _partition(zero: Any, dtypes: dict[Any, torch.dtype]) -> None:
    """Let DeepSpeed's engine build the optimizer of the parameters' present shapes, and fill it."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    whole = {parameter: (parameter.data, zero.state.get(parameter, {})) for parameter in dtypes}
    zero.state.clear()
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    built = _engine_of(zero)._configure_zero_optimizer(zero.optimizer)
    built._backward_hook_state = zero._backward_hook_state  # calls the engine
    if "step" in vars(zero):  # see `call_before_step`
        built.step = zero.step
    zero.__dict__ = vars(built)  # the user and the engine refer to the old object
    for copy, owners in _copies(zero):
        states = [whole[parameter][1] for parameter in owners]
        if any(states):
            _make_state(zero, copy, owners, states)
        for parameter, state in zip(owners, states, strict=True):
            safe_set_full_fp32_param(parameter, whole[parameter][0])
            for key in state.keys() - {"step"}:
                safe_set_full_optimizer_state(parameter, state[key], key)


def _make_state(
    zero: Any, copy: Tensor, owners: Sequence[Any], states: Sequence[dict[str, Tensor]]
) -> None:
    """Give a copy zero moments, and the number of steps of each parameter."""
    some = next(state for state in states if state)
    none = torch.zeros_like(some["step"])
    zero.state[copy] = {key: torch.zeros_like(copy) for key in some if key != "step"}
    zero.state[copy]["step"] = torch.stack([state.get("step", none) for state in states])
    _link_moments(zero, copy, owners)


def step_parameters_apart(optimizer: AnyOptimizer) -> None:
    """Let the parameters of a ZeRO optimizer differ in their number of steps, from now on.

    ZeRO steps the flat copy of a group's parameters at once. After a change of rank, its parts are
    stepped as separate parameters.
    """
    if not is_zero(optimizer):
        return
    zero: Any = optimizer
    inner: Any = zero.optimizer
    apart: list[tuple[dict[str, Any], Any, list[Parameter]]] = []

    def split(*_: Any) -> None:
        for group in inner.param_groups:
            for copy in group["params"]:
                if inner.state.get(copy) and inner.state[copy]["step"].dim() > 0:
                    apart.append((group, copy, _parts(zero, copy)))
        for group, _, parts in apart:
            group["params"] = parts

    def join(*_: Any) -> None:
        for group, copy, parts in apart:
            group["params"] = [copy]
            inner.state[copy]["step"] += 1
            for part in parts:
                del inner.state[part]
        apart.clear()

    inner.register_step_pre_hook(split)
    inner.register_step_post_hook(join)


def _parts(zero: Any, copy: Any) -> list[Parameter]:
    """Return this process's part of each parameter's copy, with its state."""
    owners = next(owners for other, owners in _copies(zero) if other is copy)
    state, parts = zero.state[copy], []
    for parameter, step in zip(owners, state["step"], strict=True):
        if _is_stage_3(zero):
            _, start, size = zero.grad_position[zero.get_param_id(parameter)]
        elif parameter._hp_mapping is None:  # all of it is on other processes
            continue
        else:
            address = parameter._hp_mapping.hp_fragment_address
            start, size = address.start, address.numel
        part = Parameter(copy.detach()[start : start + size])
        part.grad = copy.grad[start : start + size]
        moments = {k: v[start : start + size] for k, v in state.items() if k != "step"}
        zero.state[part] = moments | {"step": step.clone()}
        parts.append(part)
    return parts


def _link_moments(zero: Any, copy: Tensor, owners: Sequence[Any]) -> None:
    """Link parameters to their moments, of which DeepSpeed leaves out some and all loaded ones."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if not _is_stage_3(zero):
        lazy_init_hp_params_optimizer_state(owners, copy, zero.state)


def _copies(zero: Any) -> list[tuple[Any, list[Any]]]:
    """Return this process's part of each flat copy, with the parameters that the copy is of."""
    if _is_stage_3(zero):
        return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
    return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))


def _engine_of(zero: Any) -> Any:
    """Return the `DeepSpeedEngine`, which made the optimizer and is called by it."""
    return zero._grad_acc_post_hooks[0].__self__


def _is_stage_3(optimizer: object) -> bool:
    return type(optimizer).__name__ == _STAGE_3
