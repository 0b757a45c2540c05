"""Check by names and shapes of layers whether a saved adapter fits a base model."""

from typing import Any

from torch import nn

from dynlora.adapter_files.adapter import PREFIX, SavedAdapter
from dynlora.errors import AdapterError


def check_fits(adapter: SavedAdapter, base: nn.Module) -> None:
    """Check that every tensor of an adapter fits a model.

    Args:
        adapter: The adapter.
        base: The model without adapters, with its head.

    Raises:
        AdapterError: If a layer is missing or has another shape.
    """
    modules = dict(base.named_modules())
    for layer in adapter.layers:
        if layer.name not in modules:
            raise _misfit(adapter, base, f"no module {layer.name!r}")
        wanted = tuple(sorted((layer.lora_A.shape[1], len(layer.lora_B))))
        found = _sides(modules[layer.name])
        if wanted != found:
            raise _misfit(adapter, base, f"{layer.name!r} with sides {found} where it is {wanted}")
    parameters = dict(base.named_parameters())
    for key, tensor in adapter.others.items():
        name = key.removeprefix(PREFIX)
        if name in parameters and parameters[name].shape != tensor.shape:
            both = f"{tuple(parameters[name].shape)} where it is {tuple(tensor.shape)}"
            raise _misfit(adapter, base, f"{name!r} of shape {both}")


def _sides(module: Any) -> tuple[int, ...]:
    """Return a layer's two widths, smaller first; for a convolution, its channels."""
    kernel = module.weight.shape[:2] if module.weight.dim() > 1 else (0, 0)
    if isinstance(module, nn.Linear):  # quantized weights have another shape
        kernel = (module.in_features, module.out_features)
    return tuple(sorted(kernel))


def _misfit(adapter: SavedAdapter, base: nn.Module, what: str) -> AdapterError:
    return AdapterError(
        f"the adapter in {adapter.folder} must be of this base model, a {type(base).__name__}, "
        f"which has {what}: use the model that it was trained on, {adapter.base_model or 'unknown'}"
        ", with the same number of labels."
    )
