"""One model call to the complexity of its examples, or of each token's prefix.

During generation, a call contains only the newest token. The prefix before it is stored with the
key-value cache that the call continues.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dynlora.adapters.taps import example_keys, mix
from dynlora.errors import EngineError
from dynlora.input_adaptive.complexity import Prefix, running_variance
from dynlora.input_adaptive.inputs import (
    FeatureReader,
    cache_in,
    check_model,
    find_cache,
    looks_ahead,
    named_arguments,
    read_mask,
)
from dynlora.types import UNUSED_KEY


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Inputs and complexity of one call."""

    inputs: Tensor
    """The model's main input."""
    mask: Bool[Tensor, "batch tokens"]
    """True for unmasked tokens."""
    complexity: Float[Tensor, "batch"] | Float[Tensor, "batch tokens"]
    """Per example if tokens may attend to later ones, otherwise per prefix; NaN if unknown."""
    prefix: Prefix
    """Prefix of each sequence, this call's tokens included."""
    cache: Cache | None
    """Cache that the call continues."""


class ComplexityReader:
    """Reads calls, and stores the prefix of each cache for the cache's lifetime."""

    def __init__(self, root: nn.Module) -> None:
        """Check that the input of `root`, the model inside PEFT's wrapper, can be read.

        Raises:
            LayerError: If it cannot.
        """
        self.model: PreTrainedModel = check_model(root)
        self.whole = looks_ahead(self.model)
        """Whether complexity is per whole example; otherwise per prefix."""
        self._features = FeatureReader(self.model)
        self._prefixes: WeakKeyDictionary[Cache, tuple[Prefix, list[ref[Tensor]]]]
        self._prefixes = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the prefixes: a copy has other caches, and weak references cannot be pickled."""
        return {key: value for key, value in vars(self).items() if key != "_prefixes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without prefixes."""
        vars(self).update(state, _prefixes=WeakKeyDictionary())

    @torch.no_grad()
    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        """Read the arguments of a call.

        Raises:
            EngineError: If the call continues an unknown or changed cache.
            LayerError: If the input cannot be read.
        """
        given = named_arguments(module, args, kwargs)
        inputs, features = self._features.read(given)
        length = inputs.shape[1] if inputs.dim() == 2 else inputs.flatten(2).shape[2]
        mask = read_mask(given, len(inputs), length).to(inputs.device)
        cache = find_cache(given)
        complexity, prefix = running_variance(features, mask, self._before(cache))
        return Reading(
            inputs=inputs,
            mask=mask,
            complexity=complexity[:, -1] if self.whole else complexity,
            prefix=prefix,
            cache=cache,
        )

    def remember(self, reading: Reading, output: Any) -> None:
        """Store the prefix for calls that continue this call's cache."""
        cache = reading.cache if reading.cache is not None else cache_in(output)
        if cache is not None:
            self._prefixes[cache] = reading.prefix, [ref(tensor) for tensor in _tensors(cache)]

    def _before(self, cache: Cache | None) -> Prefix | None:
        if cache is None or int(cache.get_seq_length()) == 0:
            return None
        if self.whole or cache not in self._prefixes:
            raise EngineError(
                f"Input-adaptive ranks need a cache that this model's calls have filled while they "
                f"were on, got a {type(cache).__name__} of {int(cache.get_seq_length())} tokens "
                "that they have not: begin with an empty cache, or leave them off to the end."
            )
        prefix, tensors = self._prefixes[cache]
        if [id(old()) for old in tensors] != [id(new) for new in _tensors(cache)]:
            raise EngineError(
                f"Input-adaptive ranks need a cache that nobody changes between two calls, got a "
                f"{type(cache).__name__} whose sequences were reordered, repeated or cut (beam "
                "search and assisted generation do that): generate with `num_beams=1`, or switch "
                "input-adaptive ranks off."
            )
        return prefix


def _tensors(cache: Cache) -> list[Tensor]:
    """Return the tensors of a cache's first layer; reordering sequences replaces them."""
    return [value for value in vars(cache.layers[0]).values() if isinstance(value, Tensor)]


def sampling_keys(reading: Reading, step: int) -> Int[Tensor, " n"]:
    """Return a sampling key per complexity, `UNUSED_KEY` for padding.

    Keys do not depend on the batch or its padding (see `taps.example_keys`).
    """
    inputs, mask = reading.inputs, reading.mask
    if inputs.dim() > 2:  # images have no padding
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    positions = torch.where(mask, mask.cumsum(dim=1) - 1, -1)
    keys = example_keys(inputs, positions, step)
    if reading.complexity.dim() == 1:
        return keys & UNUSED_KEY
    tokens = mix(keys[:, None] + positions) & UNUSED_KEY
    return torch.where(mask, tokens, UNUSED_KEY).flatten()
