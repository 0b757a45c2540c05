"""What is known of a LoRA layer without looking at its tensors."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class LayerShape(Protocol):
    """One LoRA layer's name, rank and size; all that the adjuster reads."""

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
        """Rank of a full update of the layer, or what its tensors have room for if that is less."""
        ...

    @property
    def cost(self) -> int:
        """Parameters that one rank takes: ``in_features + out_features``."""
        ...

    @property
    def is_trained(self) -> bool:
        """Whether its weights change in training; those of a frozen layer stay, rank included."""
        ...
