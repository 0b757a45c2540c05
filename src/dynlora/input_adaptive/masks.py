"""Components that each example or token uses: from quarters to a mask behind `lora_A`."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dynlora.adapters.layers import LoraView
from dynlora.errors import LayerError
from dynlora.input_adaptive.complexity import components_used


def check_kind(layer: LoraView) -> None:
    """Check that a hook can mask the components of a layer.

    Raises:
        LayerError: If not, as in embeddings, which PEFT looks up without a module.
    """
    if not isinstance(layer.factor_A.holder, nn.Linear | nn.Conv2d):
        raise LayerError(
            f"Input-adaptive ranks need LoRA on linear layers and convolutions, got {layer.name!r} "
            f"on a {type(layer.module.get_base_layer()).__name__}: leave it out of "
            "`target_modules`, or set `input_adaptive=False`."
        )


@dataclass(kw_only=True, slots=True)
class ComponentMask:
    """Components that layers use in one call of the model; all if `quarter` is None."""

    quarter: Int[Tensor, "batch"] | Int[Tensor, "batch tokens"] | None = None
    """Quarter per example, or per token."""
    rows: tuple[int, ...] = ()
    """Number of examples, and of tokens per example."""
    _by_rank: dict[int, Tensor] = field(default_factory=dict)

    def of(self, layer: LoraView, output: Tensor) -> Tensor:
        """Return the factor on the output of `lora_A`: 1 for used components, otherwise 0.

        Raises:
            LayerError: If the output's rows are not the call's examples and tokens.
        """
        assert self.quarter is not None
        batch, shape = self.rows[0], tuple(output.shape)
        mask, used = self._used(layer.r), tuple(self.quarter.shape)
        convolves = isinstance(layer.factor_A.holder, nn.Conv2d)
        if convolves and len(used) == 1 and len(shape) == 4 and shape[0] == batch:
            mask = mask[:, :, None, None]
        elif not convolves and used == shape[:-1]:
            pass
        elif not convolves and len(used) == 1 and len(shape) > 2 and shape[0] == batch:
            mask = mask.reshape(batch, *[1] * (len(shape) - 2), layer.r)
        elif not convolves and len(shape) == 2 and shape[0] == self.rows[0] * self.rows[1]:
            mask = mask.flatten(0, 1) if len(used) == 2 else mask.repeat_interleave(self.rows[1], 0)
        else:
            raise LayerError(
                f"With input-adaptive ranks, LoRA layer {layer.name!r} must see the tokens of the "
                f"batch, {self.rows}, got rows of shape {shape[:-1]}, which cannot be told apart "
                "(pooled or selected tokens, experts, several adapters in a batch): leave it out "
                "of `target_modules`, or set `input_adaptive=False`."
            )
        return mask.to(output)

    def _used(self, r: int) -> Tensor:
        """Return which of `r` components are used, on a last axis behind the axes of `quarter`."""
        assert self.quarter is not None
        if r not in self._by_rank:
            used = torch.tensor(components_used(r), device=self.quarter.device)[self.quarter]
            self._by_rank[r] = torch.arange(r, device=used.device) < used[..., None]
        return self._by_rank[r]
