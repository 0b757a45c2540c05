"""Steps whose forwards run as written, though the model was compiled.

Hooks that look at activations would be compiled into the model, or break its graph at every layer,
and each change of what they do would compile it anew. The few steps that have hooks are left to
Python; all others find the model without any, as it was compiled.
"""

import sys
from typing import Any

import torch


class EagerSteps:
    """Turns compiled code off and on again, as it was."""

    def __init__(self) -> None:
        self._stance: Any = None

    def begin(self) -> None:
        """Leave forwards to Python from here on, if anything can have been compiled."""
        if self._stance is None and "torch._dynamo" in sys.modules:
            self._stance = torch.compiler.set_stance("force_eager")

    def end(self) -> None:
        """Let compiled code run again."""
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None
