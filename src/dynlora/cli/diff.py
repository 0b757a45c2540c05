"""`dynlora diff A B`: print how far the updates of two LoRA adapters agree, layer by layer."""

from dataclasses import asdict
from typing import Any

import click

from dynlora.cli.arguments import ADAPTER, FILE, Verb
from dynlora.cli.output import Output, layer_table


def _run(given: Any, output: Output) -> None:
    from dynlora.adapter_files.diff import diff
    from dynlora.adapter_files.reader import read_any

    first, second = read_any(given.first), read_any(given.second)
    layers, total = diff(first, second)
    values = {
        "base_models": [first.base_model, second.base_model],
        "total": asdict(total),
        "layers": [asdict(layer) for layer in layers],
    }
    output.show(_table(f"A: {given.first}, B: {given.second}", values), values)


def _table(title: str, values: dict[str, Any]) -> Any:
    columns = {heading: (f"{{{heading}}}", cell) for heading, cell in _row(values["total"]).items()}
    ranks = [layer["rank"] for layer in values["layers"]]
    notes = (
        f"{sum(0 not in pair for pair in ranks)} layers in both, {sum(not b for _, b in ranks)} in "
        f"A only, {sum(not a for a, _ in ranks)} in B only. norm: of scaling x B x A; cosine: of "
        "the two updates; inside: share of B's energy in A's output directions."
    )
    return layer_table(title, columns, map(_row, values["layers"]), notes)


def _row(layer: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a layer, or of all layers, by heading."""
    return {
        "layer": layer["name"],
        "rank": " | ".join(map(str, layer["rank"])),
        "parameters": " | ".join(f"{count:,}" for count in layer["parameters"]),
        "norm": " | ".join(f"{norm:.3g}" for norm in layer["norm"]),
        "cosine": "-" if layer["cosine"] is None else f"{layer['cosine']:.3f}",
        "inside": "-" if layer["inside"] is None else f"{layer['inside']:.1%}",
    }


COMMAND = Verb(
    "diff",
    "two LoRA adapters side by side: ranks, norms, agreement",
    _run,
    [
        click.Argument(["first"], type=FILE, metavar="A", help=ADAPTER.help),
        click.Argument(["second"], type=FILE, metavar="B", help="Another adapter."),
    ],
)
