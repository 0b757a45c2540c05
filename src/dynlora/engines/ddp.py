"""DistributedDataParallel: wrapped model in, and a reducer for parameters of new shapes out.

A reducer hooks the gradient accumulator of each parameter, and a change of shape replaces that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dynlora.errors import EngineError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of `torch.compile` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        else:
            return model


def may_be_wrapped() -> bool:
    """Return whether a `DistributedDataParallel` can exist in this process."""
    return distributed.is_available() and distributed.is_initialized()


def rebuild_running_reducer() -> bool:
    """Rebuild the reducer of the wrapper whose forward is running; return whether this was done.

    Forwards without gradients do not need it, and their tensors may be of inference mode.

    Raises:
        EngineError: If a communication hook keeps tensors of the old buckets' shapes.
    """
    wrapper: Any = DistributedDataParallel._active_ddp_module
    if wrapper is None or not torch.is_grad_enabled():
        return False
    if any(type(state).__name__ == "PowerSGDState" for _, state in wrapper._comm_hooks):
        raise EngineError(
            "Communication hooks must not keep tensors per bucket while ranks may move, but got "
            "PowerSGD. Use another hook."
        )
    _rebuild_reducer(wrapper)
    if wrapper.require_backward_grad_sync:
        wrapper.reducer.prepare_for_forward()  # as the wrapper has called it on the old reducer
    return True


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled code would contain the old reducer
def _rebuild_reducer(wrapper: Any) -> None:
    """Rebuild a wrapper's reducer, with its settings and communication hooks, on this process."""
    wrapper._remove_autograd_hooks()
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    wrapper._has_rebuilt_buckets = False
    hooks: list[tuple[Callable[..., Any], object]] = wrapper._comm_hooks
    wrapper._comm_hooks = []
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
    if wrapper.static_graph:
        wrapper._static_graph_delay_allreduce_enqueued = False
        wrapper.reducer._set_static_graph()
        wrapper.logger._set_static_graph()
