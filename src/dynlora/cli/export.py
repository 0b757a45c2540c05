"""`dynlora export ADAPTER --format FORMAT --output DIR`: rewrite an adapter, or merge it."""

from collections.abc import Sequence
from pathlib import Path

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.output import Output

FORMATS = {
    "native": "a stock PEFT adapter with the ranks it has",
    "uniform": "one rank, zero-padded, scaling folded in: the same function, for servers",
}


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: What follows `export` on the command line.
        output: Where its words go.

    Raises:
        DynamicLoraError: If the input must be mended.
    """
    given = parse(_parser(), arguments)
    if given is None:
        return

    # Only now: these load torch, and `--help` shall not wait for it.
    from rich.text import Text

    from dynlora.saved.adapter import read_adapter, write_adapter
    from dynlora.saved.folder import check_free
    from dynlora.saved.rewrite import native, uniform

    check_free(given.output)
    adapter = read_adapter(given.adapter)
    made = native(adapter) if given.format == "native" else uniform(adapter, given.rank)
    write_adapter(made, given.output)
    values = {
        "format": given.format,
        "output": str(given.output),
        "parameters_before": adapter.parameters,
        "parameters": made.parameters,
        "ranks": {layer.name: layer.r for layer in made.layers},
    }
    output.show(
        Text(f"{given.format} adapter with {made.parameters:,} parameters: {given.output}"), values
    )


def _parser() -> VerbParser:
    parser = verb_parser("export")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a LoRA adapter")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()),
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--rank", type=int, help="one rank of all layers (uniform: the highest)")
    return parser
