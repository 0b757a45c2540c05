"""Arguments of one model call to the features, mask and cache for its complexity.

Inputs that would make an example's complexity depend on other tokens are refused.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dynlora.errors import EngineError, LayerError
from dynlora.input_adaptive.complexity import Features, in_units, unit_for

PIXEL_UNIT = 2.0**-12
"""Unit of pixels. Normalised pixels are a few units around 0; these integers cover -8 to 8."""

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "packed_seq_lens")
"""Arguments that pack several texts into one row."""


def named_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by their names in `forward`."""
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_model(root: nn.Module) -> PreTrainedModel:
    """Check that input-adaptive ranks can read a model's input.

    Raises:
        LayerError: If it is not a transformers model of texts or images, is an encoder-decoder, or
            has layers that see only some tokens (experts).
    """
    if not isinstance(root, PreTrainedModel):
        raise _not_adaptive("a model of transformers", f"a {type(root).__name__}")
    if root.main_input_name not in ("input_ids", "pixel_values"):
        raise _not_adaptive("a model of texts or images", f"one that reads {root.main_input_name}")
    if root.config.is_encoder_decoder:
        raise _not_adaptive(
            "one sequence of tokens", f"the encoder and the decoder of a {type(root).__name__}"
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


def looks_ahead(model: PreTrainedModel) -> bool:
    """Return whether tokens see later ones: the model is neither causal nor able to generate."""
    causal = any(vars(module).get("is_causal") is True for module in model.modules())
    return not causal and not model.can_generate()


class FeatureReader:
    """Reads tokens as rows of the base model's frozen embedding, images as pixels.

    Both are bit for bit independent of the batch. Inputs of later layers are not: a rounding error
    could move an example across a threshold.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Find the embedding.

        Raises:
            LayerError: If its weights are trained.
        """
        self._name = model.main_input_name
        self._table: Tensor | None = None
        self._unit = PIXEL_UNIT
        if self._name == "input_ids":
            self._table = _base_of(model.get_input_embeddings()).weight
            if self._table.requires_grad:
                raise LayerError(
                    "Input-adaptive ranks need an input embedding that stays as it is, got one "
                    "with requires_grad=True: freeze it, or train it with `modules_to_save`, which "
                    "keeps the original."
                )
            low, high = self._table.aminmax()
            self._unit = unit_for(max(abs(float(low)), abs(float(high))))

    def read(self, given: Mapping[str, Any]) -> tuple[Tensor, Features]:
        """Return a call's main input, and its features.

        Raises:
            LayerError: If the input is missing.
        """
        inputs = given.get(self._name)
        if not isinstance(inputs, Tensor) or inputs.dim() < 2:
            others = sorted(name for name, value in given.items() if isinstance(value, Tensor))
            raise LayerError(
                f"Input-adaptive ranks need `{self._name}`, got {', '.join(others) or 'none'}: "
                f"call the model with `{self._name}`, or switch input-adaptive ranks off."
            )
        table, unit = self._table, self._unit
        if table is None:
            pixels = inputs.flatten(2).transpose(1, 2)
            return inputs, Features(
                width=pixels.shape[2],
                unit=unit,
                read=lambda columns: in_units(pixels[:, :, columns], unit),
            )
        return inputs, Features(
            width=table.shape[1],
            unit=unit,
            read=lambda columns: in_units(table[:, columns][inputs.to(table.device)], unit),
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


def read_mask(given: Mapping[str, Any], batch: int, length: int) -> Bool[Tensor, "batch tokens"]:
    """Return the mask of a call's tokens.

    Args:
        given: Arguments by name.
        batch: Sequences in the call.
        length: Tokens per sequence in this call, without cached ones.

    Raises:
        LayerError: If the mask has another layout, or several texts share a row.
    """
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool)
    if (
        not isinstance(mask, Tensor)
        or mask.dim() != 2
        or len(mask) != batch
        or mask.shape[1] < length
    ):
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


def find_cache(given: Mapping[str, Any]) -> Cache | None:
    """Return the cache that a call continues; None without one.

    Raises:
        EngineError: If it is not a `transformers.Cache`.
    """
    found = [given.get(name) for name in ("cache", "past_key_values", "cache_params")]
    caches = [value for value in found if value is not None]
    if caches and not isinstance(caches[0], Cache):
        raise EngineError(
            f"Input-adaptive ranks need a `transformers.Cache`, got a {type(caches[0]).__name__}: "
            "use `DynamicCache`."
        )
    return caches[0] if caches else None


def cache_in(output: Any) -> Cache | None:
    """Return the cache in a call's output; None without one."""
    values = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, Mapping | tuple):
        return None
    return next((value for value in values if isinstance(value, Cache)), None)
