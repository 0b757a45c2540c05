"""Protocol of a LoRA layer without its tensors."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class LayerShape(Protocol):
    """Name, rank and size of one LoRA layer, as the adjuster needs them."""

    @property
    def name(self) -> str:
        """Module name as in the base model's `named_modules()`."""
        ...

    @property
    def r(self) -> int:
        """Live rank."""
        ...

    @property
    def widest(self) -> int:
        """Rank of a full update of the layer, or of its static tensors."""
        ...

    @property
    def cost(self) -> int:
        """Parameters per rank: ``in_features + out_features``."""
        ...

    @property
    def is_trained(self) -> bool:
        """Whether the layer is trained; a frozen layer keeps its weights and rank."""
        ...
