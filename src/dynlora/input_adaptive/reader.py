"""One model call to the complexity of its examples, or of each token's prefix.

A call of generation has only the newest token; the prefix before it is stored with the cache.
Inputs that would make an example's complexity depend on other tokens are refused.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dynlora.adapters.hooks import example_keys, mix
from dynlora.errors import EngineError, LayerError
from dynlora.input_adaptive.complexity import (
    Features,
    Prefix,
    in_units,
    running_variance,
    unit_for,
)
from dynlora.types import UNUSED_KEY

PIXEL_UNIT = 2.0**-12
"""Unit of pixels. Normalised pixels are a few units around 0; these integers cover -8 to 8."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "packed_seq_lens")
"""Arguments that pack several texts into one row."""


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
    """Reads calls, and stores the prefix of each cache for the cache's lifetime.

    Tokens are read as rows of the base model's frozen embedding, images as pixels, because both are
    bit for bit independent of the batch. Inputs of later layers are not.
    """

    def __init__(self, root: nn.Module) -> None:
        """Check that the input of `root`, the model inside PEFT's wrapper, can be read."""
        self.model: PreTrainedModel = _readable(root)
        causal = any(vars(part).get("is_causal") is True for part in self.model.modules())
        self.whole = not causal and not self.model.can_generate()
        """Whether complexity is per whole example, because tokens see later ones; otherwise per
        prefix."""
        self._name = self.model.main_input_name
        self._table: Tensor | None = None
        self._unit = PIXEL_UNIT
        if self._name == "input_ids":
            self._table = _base_of(self.model.get_input_embeddings()).weight
            if self._table.requires_grad:
                raise LayerError(
                    "Input-adaptive ranks need an input embedding that stays as it is, got one "
                    "with requires_grad=True: freeze it, or train it with `modules_to_save`, which "
                    "keeps the original."
                )
            low, high = self._table.aminmax()
            self._unit = unit_for(max(abs(float(low)), abs(float(high))))
        self._prefixes: WeakKeyDictionary[Cache, tuple[Prefix, list[ref[Tensor]]]]
        self._prefixes = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Exclude the prefixes: a copy has other caches, and weak references cannot be pickled."""
        return {key: value for key, value in vars(self).items() if key != "_prefixes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _prefixes=WeakKeyDictionary())

    @torch.no_grad()
    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
        """Read the arguments of a call; an unknown or changed cache is an `EngineError`."""
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs, features = self._features(given)
        length = inputs.shape[1] if inputs.dim() == 2 else inputs.flatten(2).shape[2]
        mask = _read_mask(given, len(inputs), length).to(inputs.device)
        cache = _find_cache(given)
        complexity, prefix = running_variance(features, mask, self._before(cache))
        return Reading(
            inputs=inputs,
            mask=mask,
            complexity=complexity[:, -1] if self.whole else complexity,
            prefix=prefix,
            cache=cache,
        )

    def _features(self, given: Mapping[str, Any]) -> tuple[Tensor, Features]:
        inputs = given.get(self._name)
        if not isinstance(inputs, Tensor) or inputs.dim() < 2:
            others = sorted(name for name, value in given.items() if isinstance(value, Tensor))
            raise LayerError(
                f"Input-adaptive ranks need `{self._name}`, got {', '.join(others) or 'none'}: "
                f"call the model with `{self._name}`, or switch input-adaptive ranks off."
            )
        table, unit = self._table, self._unit
        rows = inputs.flatten(2).transpose(1, 2) if table is None else inputs.to(table.device)

        def read(columns: slice) -> Tensor:
            return in_units(rows[:, :, columns] if table is None else table[:, columns][rows], unit)

        width = rows.shape[2] if table is None else table.shape[1]
        return inputs, Features(width=width, unit=unit, read=read)

    def remember(self, reading: Reading, output: Any) -> None:
        """Store the prefix for calls that continue this call's cache."""
        cache = reading.cache if reading.cache is not None else _cache_in(output)
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
    """Return a sampling key per complexity, `UNUSED_KEY` for padding, in any batch the same."""
    inputs, mask = reading.inputs, reading.mask
    if inputs.dim() > 2:  # images have no padding
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    positions = torch.where(mask, mask.cumsum(dim=1) - 1, -1)
    keys = example_keys(inputs, positions, step)
    if reading.complexity.dim() == 1:
        return keys & UNUSED_KEY
    tokens = mix(keys[:, None] + positions) & UNUSED_KEY
    return torch.where(mask, tokens, UNUSED_KEY).flatten()


def _readable(root: nn.Module) -> PreTrainedModel:
    """Return the model if it reads texts or images, without encoder-decoder or experts."""
    if not isinstance(root, PreTrainedModel):
        raise _not_adaptive("a model of transformers", f"a {type(root).__name__}")
    if root.main_input_name not in ("input_ids", "pixel_values"):
        raise _not_adaptive("a model of texts or images", f"one that reads {root.main_input_name}")
    if root.config.is_encoder_decoder:
        raise _not_adaptive(
            "one sequence of tokens", f"the encoder and the decoder of a {type(root).__name__}"
        )
    kinds = root.input_modalities
    if len(kinds) > 1 and not isinstance(kinds, str) and not root.can_generate():
        raise _not_adaptive(
            "one input", f"towers for {' and '.join(kinds)} ({type(root).__name__})"
        )
    for config in (root.config, root.config.get_text_config()):
        for key, value in config.to_dict().items():
            if key.endswith("experts") and isinstance(value, int) and value > 1:
                raise _not_adaptive(
                    "layers that see every token",
                    f"a {type(root).__name__} with {key}={value} (mixture of experts)",
                )
    return root


def _not_adaptive(required: str, given: str) -> LayerError:
    return LayerError(
        f"Input-adaptive ranks need {required}, got {given}: set `input_adaptive=False`."
    )


def _base_of(embedding: Any) -> Any:
    """Return an embedding without PEFT's wrappers."""
    while True:
        if isinstance(embedding, AuxiliaryTrainingWrapper):
            embedding = embedding.original_module
        elif isinstance(embedding, BaseTunerLayer):
            embedding = embedding.get_base_layer()
        else:
            return embedding


def _read_mask(given: Mapping[str, Any], batch: int, length: int) -> Bool[Tensor, "batch tokens"]:
    """Return the mask of a call's tokens, without cached ones; one text per row."""
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool)
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == batch
    if not fits or mask.shape[1] < length:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise LayerError(
            f"Input-adaptive ranks need an `attention_mask` of shape ({batch}, tokens) with at "
            f"least {length} tokens, got {shape}: give the mask of the tokens; with `generate`, "
            "leave `cache_implementation` at its default."
        )
    recent = mask[:, -length:] != 0
    _check_unpacked(given, recent)
    return recent


def _check_unpacked(given: Mapping[str, Any], mask: Bool[Tensor, "batch tokens"]) -> None:
    packed = [name for name in _PACKED if given.get(name) is not None]
    positions = given.get("position_ids")
    if isinstance(positions, Tensor):
        if positions.shape[-1] != mask.shape[1] or positions.dim() != 2:
            packed.append(f"position_ids of shape {tuple(positions.shape)}")
        else:
            both = mask[:, 1:] & mask[:, :-1]
            steps = positions.to(mask.device).diff(dim=1)
            if bool((both & (steps != 1)).any()):
                packed.append("position_ids that restart")
    if packed:
        raise LayerError(
            f"Input-adaptive ranks need one text in each row, got {', '.join(packed)}: switch "
            "packing (and `padding_free`) off, or set `input_adaptive=False`."
        )


def _find_cache(given: Mapping[str, Any]) -> Cache | None:
    found = [given.get(name) for name in ("cache", "past_key_values", "cache_params")]
    caches = [value for value in found if value is not None]
    if caches and not isinstance(caches[0], Cache):
        raise EngineError(
            f"Input-adaptive ranks need a `transformers.Cache`, got a {type(caches[0]).__name__}: "
            "use `DynamicCache`."
        )
    return caches[0] if caches else None


def _cache_in(output: Any) -> Cache | None:
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple):
        return None
    return next((value for value in values if isinstance(value, Cache)), None)
