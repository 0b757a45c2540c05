"""Fixed allocations of one parameter budget: all layers, or one kind or half of them."""

from collections.abc import Callable, Mapping

BLOCK_PLACE = 1
"""Position of the block's number in a layer's name, `layers.3.mlp.up_proj`."""
OUTPUTS = ("o_proj", "down_proj", "fc2")
"""Last layers of attention and of the feed-forward part."""
CHOICES: Mapping[str, Callable[[str, int, int], bool]] = {
    "uniform": lambda _name, _block, _blocks: True,
    "mlp": lambda name, _block, _blocks: ".mlp." in name,
    "attention": lambda name, _block, _blocks: ".mlp." not in name,
    "lower": lambda _name, block, blocks: block < blocks / 2,
    "upper": lambda _name, block, blocks: block >= blocks / 2,
    "outputs": lambda name, _block, _blocks: name.endswith(OUTPUTS),
}
"""Whether a layer has an adapter, from its name, its block and the number of blocks."""


def allocate(choice: str, costs: Mapping[str, int], r: int) -> dict[str, int]:
    """Return the rank of each layer that has an adapter.

    The chosen layers share the parameters of rank r on all layers: an equal rank for each, then one
    more from the last layer on, until no layer can have one more.

    Args:
        choice: Name in `CHOICES`.
        costs: Parameters per rank by layer, in the model's order.
        r: Rank on all layers that has the same parameters.
    """
    block_of = {name: int(name.split(".")[BLOCK_PLACE]) for name in costs}
    blocks = max(block_of.values()) + 1
    chosen = [name for name in costs if CHOICES[choice](name, block_of[name], blocks)]
    budget = r * sum(costs.values())
    equal = budget // sum(costs[name] for name in chosen)
    ranks = dict.fromkeys(chosen, equal)
    free = budget - equal * sum(costs[name] for name in chosen)
    for name in reversed(chosen):
        if costs[name] <= free:
            ranks[name] += 1
            free -= costs[name]
    return ranks
