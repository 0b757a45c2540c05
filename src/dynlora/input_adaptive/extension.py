"""Input-adaptive ranks in training: the extension behind `DynamicLoraConfig.input_adaptive`."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from dynlora.adapters.extension import Host
from dynlora.adapters.layers import LoraView
from dynlora.input_adaptive.ranks import InputAdaptiveRanks, close_input_adaptive


class InputAdaptiveExtension:
    """Samples complexities until ranks are frozen, and updates the thresholds at events."""

    def __init__(self) -> None:
        self._ranks: InputAdaptiveRanks | None = None

    @property
    def ranks(self) -> InputAdaptiveRanks:
        """The masks; from `attach` on."""
        assert self._ranks is not None
        return self._ranks

    @staticmethod
    def remove(layers: Sequence[LoraView]) -> bool:
        """Remove the masks of earlier runs from these layers; return whether there were any."""
        return close_input_adaptive(layers)

    def attach(self, host: Host) -> None:
        """Install the masks, and sample complexities from now on."""
        if self._ranks is None:
            adapter = host.layers[0].adapter
            self._ranks = InputAdaptiveRanks(host.model, adapter_name=adapter, timed=host.timed)
        self._ranks.open()
        self._ranks.observing = True

    def begin_step(self, step: int, *, sampled: bool) -> None:
        """Set the step for sampling keys."""
        self.ranks.begin_step(step)

    def after_event(self, order: Callable[[], None]) -> None:
        """Order the components, and compute the thresholds from the sample."""
        order()
        self.ranks.update()

    def freeze(self) -> None:
        """Keep the thresholds from now on."""
        self.ranks.observing = False

    def close(self) -> None:
        """Remove the masks, so that every example uses every component."""
        self.ranks.close()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sample and the thresholds."""
        return self.ranks.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of `state_dict`."""
        self.ranks.load_state_dict(state)
