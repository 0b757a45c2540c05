"""Rewrite a saved adapter with the same function, or its best approximation at a given rank."""

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.spectrum import find_components
from dynlora.errors import AdapterError


def native(adapter: SavedAdapter) -> SavedAdapter:
    """Return the adapter with pattern entries only for layers that differ from the defaults."""
    return adapter.with_layers(list(adapter.layers))


def uniform(adapter: SavedAdapter, rank: int | None = None) -> SavedAdapter:
    """Return the adapter with one rank and a scaling of 1 in every layer; its function is the same.

    Layers are padded with zeros and their scaling is folded into `lora_B`, for engines that support
    only one rank and one `lora_alpha`.

    Args:
        adapter: The adapter.
        rank: Rank of all layers; None uses the highest rank of any layer.

    Raises:
        AdapterError: If a layer has a higher rank.
    """
    highest = max(adapter.layers, key=lambda layer: layer.r)
    rank = highest.r if rank is None else rank
    if rank < highest.r:
        raise AdapterError(
            f"`--rank` must be at least the highest rank, which is {highest.r} in layer "
            f"{highest.name!r}, got {rank}: leave it out, or cut the layers with `--format "
            "svd-uniform`."
        )
    return adapter.with_layers([layer.folded().padded(rank) for layer in adapter.layers])


def svd_uniform(adapter: SavedAdapter, rank: int) -> tuple[SavedAdapter, dict[str, float]]:
    """Cut every layer to its best update of rank `rank`, and rewrite the adapter like `uniform`.

    Args:
        adapter: The adapter.
        rank: Rank of all layers, at least 1; layers with a lower rank are padded.

    Returns:
        The adapter, and the kept share of energy by layer, in ``[0, 1]``.
    """
    layers, kept = [], {}
    for layer in adapter.layers:
        parts = find_components(layer) if layer.r > rank else None
        made = layer if parts is None else parts.cut(rank)
        kept[layer.name] = 1.0 if parts is None else parts.kept(rank)
        layers.append(made.folded().padded(rank))
    return adapter.with_layers(layers), kept
