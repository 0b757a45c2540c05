"""Layer types whose LoRA ranks can change: location of PEFT's two factors, and tokens of a layer.

Every kind is read as ``scaling * lora_B @ lora_A``, where `lora_B` is the factor that starts at
zero. A direction with a zero column of `lora_B` adds nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from dynlora.adapters.factor import Factor
from dynlora.errors import LayerError
from dynlora.types import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Tokens of one forward of one layer, copied only when read."""

    shape: tuple[int, ...]
    """Layout, batch first; empty without a batch."""
    read: Callable[[Int[Tensor, " n"]], tuple[Tensor, Tensor]]
    """Function from indices in the flattened layout to inputs and outputs."""


def _see_vectors(
    _module: Any,
    lora_A: Float[Tensor, "*experts r width"],
    lora_B: Float[Tensor, "*experts height r"],
    tokens: Tokens | None,
) -> tuple[Float[Tensor, "*experts k r"], Float[Tensor, "*experts l r"]]:
    """Return projected tokens, whose Gram matrix is a mean over tokens, and `lora_B`."""
    if tokens is None:
        return lora_A.mT, lora_B
    return tokens.to(lora_A) @ lora_A.T / math.sqrt(len(tokens)), lora_B


def _base_weight(module: Any) -> Tensor:
    weight: Tensor = dequantize_module_weight(module.get_base_layer())
    return weight


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """Functions on one kind of PEFT's LoRA layers."""

    check: Callable[[str, Any], None]
    """Raises `LayerError` if a setting does not permit changes of rank; from name, layer."""
    factors: Callable[[Any, str], tuple[Factor, Factor]]
    """Returns `lora_A` and `lora_B`; from layer, adapter."""
    see: Callable[[Any, Tensor, Tensor, Tokens | None], tuple[Tensor, Tensor]] = _see_vectors
    """Returns both factors applied to observed tokens, or to unit-covariance input.

    For every ``M``, the mean squared norm of ``lora_B @ M @ lora_A`` on the tokens equals the
    squared norm of ``right @ M @ left.T``, where ``(left, right)`` of shapes ``(k, r)`` and
    ``(l, r)`` is the result; from layer, `lora_A`, `lora_B`, tokens.
    """
    rows: Callable[[Any, str, Tensor, Tensor], Rows] | None
    """Returns the tokens of one forward; from layer, adapter, input, output. None if the module's
    inputs are not those of the weight."""
    weight: Callable[[Any], Tensor] = _base_weight
    """Returns the base weight in a floating point type; from layer."""


def kind_of(name: str, module: Any) -> LayerKind:
    """Return the kind of a `peft.tuners.lora.LoraLayer`, or raise `LayerError`."""
    kind = type(module)
    full_name = f"{kind.__module__}.{kind.__qualname__}"
    if full_name not in _KINDS:
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Linear (also quantised by bitsandbytes, GPTQ, "
            "AWQ or torchao), Conv1D of transformers, nn.Embedding, nn.Conv2d or a parameter, got "
            f"{full_name} on {type(module.get_base_layer()).__name__}: name the layers to adapt, "
            'such as `target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]`, instead of '
            '"all-linear".'
        )
    return _KINDS[full_name]


# nn.Linear, Conv1D and layers quantised by bitsandbytes: PEFT's factors have the same shapes on all
# of them, and only the base weight's format differs. A token is a vector.


def _check_linear(name: str, module: Any) -> None:
    base = module.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)):
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Linear or a Conv1D, got "
            f"{type(base).__module__}.{type(base).__name__}: leave it out of `target_modules`."
        )


def _linear_factors(module: Any, adapter: str) -> tuple[Factor, Factor]:
    return (
        Factor(module.lora_A[adapter], "weight", 0, _same, _same, "out_features"),
        Factor(module.lora_B[adapter], "weight", 1, _same, _same, "in_features"),
    )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _linear_rows(_module: Any, _adapter: str, inputs: Tensor, output: Tensor) -> Rows:
    def read(index: Tensor) -> tuple[Tensor, Tensor]:
        return (
            inputs.flatten(0, -2).index_select(0, index),
            output.flatten(0, -2).index_select(0, index),
        )

    return Rows(shape=tuple(inputs.shape[:-1]), read=read)


_LINEAR = LayerKind(
    check=_check_linear,
    factors=_linear_factors,
    rows=_linear_rows,
)


# Linear layers in the packed formats of GPTQ and AWQ, which have no `weight` to read.


def _accept(_name: str, _module: Any) -> None:
    """Accept every layer that PEFT accepts."""


def _packed_weight(module: Any) -> Tensor:
    """Return the base weight as the layer's outputs on unit vectors, transposed."""
    base = module.get_base_layer()
    unit = torch.eye(module.in_features, dtype=base.scales.dtype, device=base.scales.device)
    with torch.no_grad():
        weight: Tensor = (base(unit) - base(torch.zeros_like(unit[:1]))).T
    return weight


_PACKED = LayerKind(
    check=_accept,
    factors=_linear_factors,
    rows=_linear_rows,
    weight=_packed_weight,
)


# nn.Conv2d: a convolution is a linear layer on the patches of its input. `lora_A` is
# (r, channels * kernel height * width), `lora_B` is (out, r); tokens are patches.


def _check_conv2d(name: str, module: Any) -> None:
    groups = module.get_base_layer().groups
    if groups != 1:
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Conv2d with groups=1, got groups={groups}, "
            "which ties its rank to multiples of that: leave it out of `target_modules`."
        )


def _conv2d_factors(module: Any, adapter: str) -> tuple[Factor, Factor]:
    """Return the kernels of `lora_A` and `lora_B`, the latter 1 by 1."""
    first, second = module.lora_A[adapter], module.lora_B[adapter]
    to_kernel = partial(_unflat, tuple(first.weight.shape[1:]))
    return (
        Factor(first, "weight", 0, _flat, to_kernel, "out_channels"),
        Factor(second, "weight", 1, _flat, partial(_unflat, (-1, 1, 1)), "in_channels"),
    )


def _flat(kernel: Tensor) -> Tensor:
    return kernel.flatten(1)


def _unflat(shape: tuple[int, ...], matrix: Tensor) -> Tensor:
    return matrix.reshape(len(matrix), *shape)


def _conv2d_rows(module: Any, adapter: str, inputs: Tensor, output: Tensor) -> Rows:
    """Return the patches that `lora_A` reads, one per output position; none without a batch."""
    conv = module.lora_A[adapter]
    shape = (output.shape[0], *output.shape[2:]) if inputs.dim() == 4 else ()

    def read(index: Tensor) -> tuple[Tensor, Tensor]:
        # Windows are views of the image, so that only the requested patches are copied.
        windows = pad(inputs, conv._reversed_padding_repeated_twice)
        for axis, size, stride in zip((2, 3), conv.kernel_size, conv.stride, strict=True):
            windows = windows.unfold(axis, size, stride)
        places = torch.unravel_index(index, shape)
        patches = windows.permute(0, 2, 3, 1, 4, 5)[places].flatten(1)
        return patches, output.permute(0, 2, 3, 1)[places]

    return Rows(shape=shape, read=read)


_CONV2D = LayerKind(
    check=_check_conv2d,
    factors=_conv2d_factors,
    rows=_conv2d_rows,
)


# nn.Embedding: read transposed. `lora_embedding_A` (r, ids) starts at zero and `lora_embedding_B`
# (dim, r) does not, so that the first gradients are all in `lora_embedding_A`. Its transpose is
# our `lora_B` (ids, r), and the transpose of `lora_embedding_B` our `lora_A` (r, dim). Growing then
# adds zeros where PEFT does, and metrics read nonzero gradients. The layer adds
# ``scaling * lora_A.T @ lora_B[id]`` for an id.


def _check_embedding(name: str, module: Any) -> None:
    """Check that the lookup neither rescales weights nor returns sparse gradients."""
    base = module.get_base_layer()
    if base.max_norm is not None or base.sparse:
        raise LayerError(
            f"LoRA layer {name!r} must be on an nn.Embedding with max_norm=None and "
            f"sparse=False, got max_norm={base.max_norm} and sparse={base.sparse}: leave it "
            "out of `target_modules`."
        )


def _embedding_factors(module: Any, adapter: str) -> tuple[Factor, Factor]:
    return (
        Factor(module.lora_embedding_B, adapter, 1, _transposed, _transposed),
        Factor(module.lora_embedding_A, adapter, 0, _transposed, _transposed),
    )


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T


def _see_ids(
    module: Any,
    lora_A: Float[Tensor, "r width"],
    lora_B: Float[Tensor, "height r"],
    tokens: Tokens | None,
) -> tuple[Float[Tensor, "k r"], Float[Tensor, "l r"]]:
    """Return `lora_A`, and the rows of `lora_B` scaled by the root of their frequency.

    A part ``(ids seen once + 1) / (tokens + 1)`` of the frequency is spread over all ids, because
    ids outside the sample also count. It estimates how often the next token is an unseen id, and is
    never zero.
    """
    if tokens is None:
        return lora_A.T, lora_B
    ids = len(lora_B)
    counts = torch.bincount(tokens.to(lora_B.device), minlength=ids).to(lora_B)
    unseen = float((counts == 1).sum() + 1) / (len(tokens) + 1)
    shares = (1 - unseen) * counts / len(tokens) + unseen / ids
    scale = module._get_embed_scale()
    factor = 1.0 if scale is None else float(scale)
    return lora_A.T, factor * shares.sqrt()[:, None] * lora_B


def _id_rows(_module: Any, _adapter: str, inputs: Tensor, output: Tensor) -> Rows:
    def read(index: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.flatten()[index].long(), output.flatten(0, -2)[index]

    return Rows(shape=tuple(inputs.shape), read=read)


_EMBEDDING = LayerKind(
    check=_check_embedding,
    factors=_embedding_factors,
    see=_see_ids,
    rows=_id_rows,
)


# A parameter named by `target_parameters`, such as the fused weights of all experts of a block. Its
# `lora_A` is (experts * r, in) and its `lora_B` is (out, r * experts): both are read as a matrix
# per expert, (experts, r, in) and (experts, out, r). The module routes its inputs to experts.


def _parameter_factors(module: Any, adapter: str) -> tuple[Factor, Factor]:
    first, second, experts = module.lora_A[adapter], module.lora_B[adapter], module.num_experts
    split = partial(_experts_of_rows, experts), partial(_experts_of_columns, experts)
    return (
        Factor(first, "weight", 0, split[0], _rows_of_experts, "out_features", experts),
        Factor(second, "weight", 1, split[1], _columns_of_experts, "in_features", experts),
    )


def _experts_of_rows(experts: int, weight: Tensor) -> Float[Tensor, "experts r width"]:
    return weight.reshape(experts, -1, weight.shape[1])


def _rows_of_experts(matrices: Float[Tensor, "experts r width"]) -> Tensor:
    return matrices.flatten(0, 1)


def _experts_of_columns(experts: int, weight: Tensor) -> Float[Tensor, "experts height r"]:
    return weight.reshape(len(weight), -1, experts).permute(2, 0, 1)


def _columns_of_experts(matrices: Float[Tensor, "experts height r"]) -> Tensor:
    return matrices.permute(1, 2, 0).flatten(1)


def _parameter_weight(module: Any) -> Tensor:
    weight: Tensor = module.get_param()
    return weight


_PARAMETER = LayerKind(
    check=_accept,
    factors=_parameter_factors,
    rows=None,
    weight=_parameter_weight,
)

_KINDS: Mapping[str, LayerKind] = {
    "peft.tuners.lora.layer.Linear": _LINEAR,
    "peft.tuners.lora.bnb.Linear4bit": _LINEAR,
    "peft.tuners.lora.bnb.Linear8bitLt": _LINEAR,
    "peft.tuners.lora.torchao.TorchaoLoraLinear": _LINEAR,
    "peft.tuners.lora.gptq.GPTQLoraLinear": _PACKED,
    "peft.tuners.lora.awq.AwqLoraLinear": _PACKED,
    "peft.tuners.lora.layer.Embedding": _EMBEDDING,
    "peft.tuners.lora.layer.Conv2d": _CONV2D,
    "peft.tuners.lora.layer.ParamWrapper": _PARAMETER,
}
"""By name of PEFT's class, because some need packages that may be missing."""
