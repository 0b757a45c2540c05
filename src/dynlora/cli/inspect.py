"""`dynlora inspect ADAPTER`: print rank, parameters and energy of a LoRA adapter's layers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.output import Output


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `inspect` on the command line.
        output: Shows the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return

    # Only now: these load torch, and `--help` need not wait for it.
    from dynlora.adapter_files.adapter import read_adapter
    from dynlora.adapter_files.summary import summarise

    summary = summarise(read_adapter(given.adapter))
    output.show(_table(summary), summary.to_dict())


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = verb_parser("inspect")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a LoRA adapter")
    return parser


def _table(summary: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(f"base model: {summary.base_model or 'not named'}"),
        title_justify="left",
        show_footer=True,
        box=None,
    )
    ranks = [layer.rank for layer in summary.layers]
    table.add_column("layer", f"{len(ranks)} layers", overflow="fold")
    for heading, footer in (
        ("rank", f"{min(ranks)}-{max(ranks)}"),
        ("in x out", ""),
        ("parameters", f"{summary.parameters:,}"),
        ("share", "100.0%"),
        ("energy", "100.0%"),
        ("in half", ""),
        ("effective", ""),
    ):
        table.add_column(heading, footer, justify="right", no_wrap=True)
    for layer in summary.layers:
        table.add_row(
            Text(layer.name),
            str(layer.rank),
            f"{layer.inputs} x {layer.outputs}",
            f"{layer.parameters:,}",
            f"{layer.share:.1%}",
            f"{layer.energy_share:.1%}",
            f"{layer.kept_by_half:.1%}",
            f"{layer.effective_rank:.1f}",
        )
    notes = (
        "energy: share of the sum of squared norms of scaling x B x A; in half: part of a layer's "
        "energy in the stronger half of its directions; effective: directions it is spread over."
    )
    if summary.other_parameters:
        notes += f" Beside the layers: {summary.other_parameters:,} parameters of other modules."
    table.caption = Text(notes)
    table.caption_justify = "left"
    return table
