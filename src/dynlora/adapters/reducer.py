"""Resized parameters in, and a reducer of `DistributedDataParallel` for them out."""

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dynlora.adapters.owners import OwnHook
from dynlora.engines.compiled import EagerSteps
from dynlora.engines.ddp import may_be_wrapped, rebuild_running_reducer


class ReducerHook:
    """A hook on a model until its wrapper's reducer is rebuilt, also after `DynamicLora.close`."""

    def __init__(self, model: nn.Module, *, compiled: bool) -> None:
        self._model = model
        self._compiled = compiled
        self._eager = EagerSteps()
        self._handle: RemovableHandle | None = None

    def open(self) -> None:
        """Rebuild the reducer in the next forward with gradients inside a wrapper."""
        if self._handle is None and may_be_wrapped():
            self._handle = self._model.register_forward_pre_hook(OwnHook(self._rebuild))
            if self._compiled:
                self._eager.open()

    def _rebuild(self, *_: object) -> None:
        if rebuild_running_reducer() and self._handle is not None:
            self._handle.remove()
            self._handle = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._eager.close()
