"""Are all gradients finite? Asked only where nobody has to wait for the answer.

To leave out those that are not takes copies, and on a CPU the memory that they are given costs more
than all else that is done with gradients.
"""

from jaxtyping import Bool
from torch import Tensor


def are_known_finite(finite: Bool[Tensor, " layers"]) -> bool:
    """Return whether all layers' gradients are finite; on a GPU False, which is not asked.

    Args:
        finite: Whether each layer's are.
    """
    return finite.is_cpu and bool(finite.all())
