"""`dynlora extract BASE TUNED --output DIR`: the LoRA adapter of a full fine-tune."""

from typing import Any

import click
from rich.table import Table

from dynlora.cli.arguments import COUNT, FOLDER, RELATIVE_ERROR, Verb, option
from dynlora.cli.output import Output, layer_table, readable_messages

RANK = 64  # default highest rank


def _run(given: Any, output: Output) -> None:
    from dynlora.adapter_files.extract import extract
    from dynlora.adapter_files.resize import resize
    from dynlora.adapter_files.writer import check_free

    check_free(given.output)
    with readable_messages(output.progress):
        found = extract(given.base, given.tuned, given.rank)
    if given.error is None:
        ranks = {layer.name: layer.r for layer in found.adapter.layers}
    else:
        ranks = found.plan_error(given.error)
    made = resize(found.adapter, ranks, given.output)
    values = {
        "output": str(given.output),
        "base_model": str(given.base),
        "parameters": made.parameters,
        "layers": [
            {
                "name": layer.name,
                "rank": change.rank_after,
                "parameters": change.parameters,
                "lost": found.lost(layer, change.rank_after),
            }
            for layer, change in zip(found.adapter.layers, made.layers, strict=True)
        ],
        "left_out": dict(found.left_out),
    }
    output.show(_table(values), values)


def _table(values: dict[str, Any]) -> Table:
    layers = values["layers"]
    ranks = [layer["rank"] for layer in layers]
    columns = {
        "layer": ("{name}", f"{len(layers)} layers"),
        "rank": ("{rank}", f"{min(ranks)}-{max(ranks)}"),
        "parameters": ("{parameters:,}", f"{values['parameters']:,}"),
        "lost": ("{lost:.1%}", ""),
    }
    notes = "lost: norm of the part of a layer's change that the adapter lacks, relative to it."
    if left_out := values["left_out"]:
        worst = max(left_out, key=left_out.__getitem__)
        notes += (
            f" Not in the adapter: changes of {len(left_out)} other tensors, such as biases and "
            f"norms, at most {left_out[worst]:.2%} of {worst}."
        )
    return layer_table(f"adapter: {values['output']}", columns, layers, notes)


COMMAND = Verb(
    "extract",
    "the LoRA adapter that a full fine-tune amounts to",
    _run,
    [
        click.Argument(["base"], type=FOLDER, metavar="BASE", help="Folder of the base model."),
        click.Argument(["tuned"], type=FOLDER, metavar="TUNED", help="Folder of the tuned model."),
        option("--output DIR", "A new folder.", FOLDER, required=True),
        option("--rank R", f"Highest rank of a layer (default: {RANK}).", COUNT, default=RANK),
        option(
            "--error E",
            "Largest relative error of a layer's change (Frobenius norm), such as 0.1.",
            RELATIVE_ERROR,
        ),
    ],
)
