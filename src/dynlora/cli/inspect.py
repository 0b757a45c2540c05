"""`dynlora inspect ADAPTER`: print rank, parameters and energy of a LoRA adapter's layers."""

from typing import Any

from dynlora.cli.arguments import ADAPTER, Verb
from dynlora.cli.output import Output, layer_table


def _run(given: Any, output: Output) -> None:
    from dynlora.adapter_files.reader import read_any

    values = _summary(read_any(given.adapter))
    output.show(_table(values), values)


def _summary(adapter: Any) -> dict[str, Any]:
    """Return the figures of a saved adapter; shares and `kept_by_half` are in ``[0, 1]``."""
    from dynlora.adapter_files.layer import find_components

    parts = [find_components(layer) for layer in adapter.layers]
    total, parameters = sum(part.energy for part in parts), adapter.parameters
    layers = [
        {
            "name": layer.name,
            "rank": layer.r,
            "inputs": layer.inputs,
            "outputs": layer.outputs,
            "parameters": layer.parameters,
            "share": layer.parameters / parameters,
            "norm": part.energy**0.5,
            "energy_share": part.energy / total if total else 0.0,
            "kept_by_half": part.kept((layer.r + 1) // 2),
            "effective_rank": part.effective_rank,
        }
        for layer, part in zip(adapter.layers, parts, strict=True)
    ]
    return {
        "base_model": adapter.base_model,
        "layers": layers,
        "parameters": parameters,
        "other_parameters": sum(tensor.numel() for tensor in adapter.others.values()),
    }


def _table(values: dict[str, Any]) -> Any:
    layers = values["layers"]
    ranks = [layer["rank"] for layer in layers]
    columns = {
        "layer": ("{name}", f"{len(ranks)} layers"),
        "rank": ("{rank}", f"{min(ranks)}-{max(ranks)}"),
        "in x out": ("{inputs} x {outputs}", ""),
        "parameters": ("{parameters:,}", f"{values['parameters']:,}"),
        "share": ("{share:.1%}", "100.0%"),
        "energy": ("{energy_share:.1%}", "100.0%"),
        "in half": ("{kept_by_half:.1%}", ""),
        "effective": ("{effective_rank:.1f}", ""),
    }
    notes = (
        "energy: share of the sum of squared norms of scaling x B x A; in half: share of a layer's "
        "energy in the stronger half of its directions; effective: effective number of directions."
    )
    if values["other_parameters"]:
        notes += f" Other modules: {values['other_parameters']:,} parameters."
    return layer_table(f"base model: {values['base_model'] or 'not named'}", columns, layers, notes)


COMMAND = Verb("inspect", "a LoRA adapter's layers: rank, parameters, energy", _run, [ADAPTER])
