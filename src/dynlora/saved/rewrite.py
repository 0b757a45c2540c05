"""A saved adapter in another form: the same function, or the closest one of a given rank."""

from dynlora.errors import AdapterError
from dynlora.saved.adapter import SavedAdapter


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
