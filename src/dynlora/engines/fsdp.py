"""Parameters that FSDP2 (`fully_shard`) shards across processes, and their change of shape.

torch has no public call for a change of shape. `FSDPParam`, its private object per parameter, is
replaced by one that torch builds for the new shape.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dynlora.errors import EngineError


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, which not every build of torch has."""
    return hasattr(tensor, "full_tensor")


def reshard(model: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward without backward, which it keeps for its root.

    Otherwise the model contains these copies instead of its shards.
    """
    for module in model.modules():
        sharded: Any = module
        if hasattr(module, "set_reshard_after_forward"):  # only FSDP2's modules
            sharded.reshard()


def check_sharding(parameter: Parameter) -> None:
    """Raise `EngineError` unless FSDP2 shards a parameter, without tensor parallelism."""
    _find(parameter)


@torch.no_grad()
def shard_again(parameter: Parameter, values: Tensor) -> None:
    """Give a sharded parameter whole values of another shape, present on every process."""
    group, old = _find(parameter)
    new = type(old)(
        Parameter(values.to(group.device), parameter.requires_grad),
        old._module_info,
        old.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        lambda _: old.fsdp_placement,
        old.mp_policy,
        group.offload_policy,
    )
    new.init_dtype_attrs(old.mp_policy)
    new._param_fqn = old._param_fqn
    old._post_load_hook_handle.remove()
    group.fsdp_params[group.fsdp_params.index(old)] = new
    # The module has a new parameter now. Optimizers and schedulers have the old one, so that it
    # gets the new one's shape, shard and place in the module.
    kept: Any = parameter
    made = new.sharded_param
    kept.data = made
    kept._local_tensor, kept._spec = made._local_tensor, made._spec
    new.sharded_param = kept
    new._setattr_on_modules(kept)


def _find(parameter: Parameter) -> tuple[Any, Any]:
    """Return the `FSDPParamGroup` and the `FSDPParam` that manage a parameter."""
    from torch.distributed._composable_state import _module_state_mapping

    states = [reference() for reference in list(_module_state_mapping.values())]
    for fields in (vars(state) for state in states if state is not None):
        # Earlier versions of torch have one group per module.
        for group in fields.get("_fsdp_param_groups", [fields.get("_fsdp_param_group")]):
            for managed in [] if group is None else group.fsdp_params:
                if managed.sharded_param is parameter and not managed.is_dtensor:
                    return group, managed
    raise EngineError(
        "LoRA parameters must be plain, or sharded by FSDP2 without tensor parallelism, got a "
        f"{type(parameter).__name__}: use `fully_shard` alone."
    )
