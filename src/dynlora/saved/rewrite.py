"""A saved adapter in another form: the same function, or the closest one of a given rank."""

from dynlora.errors import AdapterError
from dynlora.saved.adapter import SavedAdapter
from dynlora.saved.spectrum import find_components


def native(adapter: SavedAdapter) -> SavedAdapter:
    """Return the adapter with patterns that name each layer which differs, and nothing else."""
    return adapter.with_layers(list(adapter.layers))


def uniform(adapter: SavedAdapter, rank: int | None = None) -> SavedAdapter:
    """Return the adapter with one rank and a scaling of 1 in every layer; its function is the same.

    Layers are padded with zeros and their scaling goes into `lora_B`, for engines that know one
    rank and one `lora_alpha` only.

    Args:
        adapter: The adapter.
        rank: The rank of all layers; None takes the highest that one has.

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
    """Return the adapter with every layer cut to its best update of `rank`, then as `uniform`.

    Args:
        adapter: The adapter.
        rank: The rank of all layers, at least 1; layers that have less are padded.

    Returns:
        The adapter, and by layer the part of its energy that was kept, in ``[0, 1]``.
    """
    layers, kept = [], {}
    for layer in adapter.layers:
        parts = find_components(layer) if layer.r > rank else None
        made = layer if parts is None else parts.cut(rank)
        kept[layer.name] = 1.0 if parts is None else parts.kept(rank)
        layers.append(made.folded().padded(rank))
    return adapter.with_layers(layers), kept
