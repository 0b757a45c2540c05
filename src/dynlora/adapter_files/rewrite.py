"""Rewrite a saved adapter with one rank in every layer: the same function, or the closest one.

Some engines support only one rank and one `lora_alpha`. Layers are padded with zeros, and their
scaling is folded into `lora_B`.
"""

from dynlora.adapter_files.adapter import SavedAdapter
from dynlora.adapter_files.spectrum import find_components
from dynlora.errors import AdapterError


def uniform(adapter: SavedAdapter, rank: int | None = None) -> SavedAdapter:
    """Return the adapter with one rank and a scaling of 1 in every layer; its function is the same.

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
            f"{highest.name!r}, but got {rank}. Leave it out, or cut the layers with `--format "
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
    parts = {layer.name: find_components(layer) for layer in adapter.layers if layer.r > rank}
    cut = [parts[old.name].cut(rank) if old.name in parts else old for old in adapter.layers]
    kept = {layer.name: 1.0 for layer in adapter.layers}
    kept |= {name: part.kept(rank) for name, part in parts.items()}
    return uniform(adapter.with_layers(cut), rank), kept
