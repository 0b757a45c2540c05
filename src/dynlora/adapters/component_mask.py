"""The components that each example, or token, uses: from quarters to zeros behind `lora_A`."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dynlora.adapters.layers import LoraView
from dynlora.complexity import components_used
from dynlora.errors import LayerError


def check_kind(layer: LoraView) -> None:
    """Check that the components of a layer can be seen by a hook.

    Raises:
        LayerError: If they cannot: PEFT looks embeddings up without a module.
    """
    if not isinstance(layer.factor_A.holder, nn.Linear | nn.Conv2d):
        raise LayerError(
            f"Input-adaptive ranks need LoRA on linear layers and convolutions, got {layer.name!r} "
            f"on a {type(layer.module.get_base_layer()).__name__}: leave it out of "
            "`target_modules`, or set `input_adaptive=False`."
        )


@dataclass(kw_only=True, slots=True)
class ComponentMask:
    """What one call of the model lets its layers use; everything if nothing is given."""

    quarter: Int[Tensor, "batch"] | Int[Tensor, "batch tokens"] | None = None
    """Of each example, or of each token."""
    rows: tuple[int, ...] = ()
    """Examples, and tokens of each."""
    _by_rank: dict[int, Tensor] = field(default_factory=dict)

    def of(self, layer: LoraView, output: Tensor) -> Tensor:
        """Return what the output of `lora_A` is to be multiplied by: 1, or 0 where not used.

        Args:
            layer: The layer.
            output: What its `lora_A` gave.

        Raises:
            LayerError: If its rows are not the examples and tokens of the call.
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
        """Return which of `r` components are used, on an axis after those of `quarter`."""
        assert self.quarter is not None
        if r not in self._by_rank:
            used = torch.tensor(components_used(r), device=self.quarter.device)[self.quarter]
            self._by_rank[r] = torch.arange(r, device=used.device) < used[..., None]
        return self._by_rank[r]
