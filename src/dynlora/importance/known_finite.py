"""Check for finite gradients that never synchronizes with a GPU.

Filtering out non-finite gradients would copy them, which on a CPU costs more than all other work on
gradients.
"""

from jaxtyping import Bool
from torch import Tensor


def are_known_finite(finite: Bool[Tensor, " layers"]) -> bool:
    """Return whether all layers' gradients are finite on a CPU; False on other devices.

    Args:
        finite: Whether each layer's gradients are finite.
    """
    return finite.is_cpu and bool(finite.all())
