"""`dynlora compress ADAPTER --budget N --output DIR`: cut a LoRA adapter without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.layer_table import layer_table
from dynlora.cli.output import Output
from dynlora.errors import ConfigError

ROWS = 256
"""Default number of rows to read from the data."""


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `compress` on the command line.
        output: Shows progress and the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return
    _check_options(given)
    budget = _read_budget(given.budget)

    # Only now: these load torch, and `--help` need not wait for it.
    from dynlora.adapter_files.adapter import check_free, read_adapter, write_adapter
    from dynlora.adapter_files.compress import check_affordable, compress

    check_free(given.output)
    adapter = read_adapter(given.adapter)
    parameters = budget(adapter.parameters)
    check_affordable(adapter, parameters)
    seen = None if given.data is None else _observe(adapter, given, output)
    made = compress(adapter, parameters, seen)
    write_adapter(made.adapter, given.output)
    values = {"output": str(given.output), **made.to_dict()}
    output.show(_table(values), values)


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = verb_parser("compress")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a LoRA adapter")
    parser.add_argument(
        "--budget",
        required=True,
        metavar="N",
        help="LoRA parameters at most, or a part of what the adapter has, such as 50%%",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="texts (.parquet, .csv, .jsonl): keep what changes the layers' outputs on them",
    )
    parser.add_argument("--text", metavar="COLUMN", help="with --data: the column of texts")
    parser.add_argument("--text-pair", metavar="COLUMN", help="with --data: second texts, if any")
    parser.add_argument(
        "--rows", type=int, metavar="N", help=f"with --data: rows to read, {ROWS} unless given"
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="with --data: the base model's folder, GGUF file or hub name, where the adapter does "
        "not name a folder that exists",
    )
    return parser


def _check_options(given: Any) -> None:
    for option in ("text", "text_pair", "rows", "model"):
        if given.data is None and vars(given)[option] is not None:
            name = option.replace("_", "-")
            raise ConfigError(f"`--{name}` needs `--data FILE`. Add it, or leave `--{name}` out.")
    if given.data is not None and given.text is None:
        raise ConfigError("`--data` needs the column of its texts. Add `--text COLUMN`.")
    if given.rows is not None and given.rows < 1:
        raise ConfigError(f"`--rows` must be at least 1, but got {given.rows}.")


def _read_budget(text: str) -> Any:
    """Return a function that maps the adapter's parameter count to the budget."""
    number = text.removesuffix("%")
    try:
        value = float(number) if text.endswith("%") else int(number)
    except ValueError:
        value = 0
    if text.endswith("%") and 0 < value <= 100:
        return lambda parameters: int(parameters * value / 100)
    if not text.endswith("%") and value >= 1:
        return lambda _: value
    raise ConfigError(
        "`--budget` must be a whole number of parameters of at least 1, or a percentage above 0% "
        f"and up to 100%, but got {text}."
    )


def _observe(adapter: Any, given: Any, output: Output) -> Any:
    """Return statistics of the adapter's layers on the texts."""
    from dynlora.adapter_files.activations import (
        batch_texts,
        check_reads_texts,
        observe_texts,
        read_texts,
    )
    from dynlora.adapter_files.adapter_base import attach, load_base, locate_base
    from dynlora.adapter_files.base_models import position_limit
    from dynlora.cli.messages import readable_messages

    named = {"--text": given.text, "--text-pair": given.text_pair}
    columns = {option: column for option, column in named.items() if column is not None}
    texts = read_texts(given.data, columns, given.rows or ROWS)
    source = locate_base(adapter, given.model)
    with readable_messages(output.progress):
        base = load_base(adapter, source)
        check_reads_texts(base, source)
        batches = batch_texts(texts, source, position_limit(base))
        output.progress.print(f"reading {len(texts[0])} rows of {given.data}", markup=False)
        return observe_texts(attach(adapter, base), adapter, batches)


def _table(values: dict[str, Any]) -> Any:
    columns = {
        "layer": f"{len(values['layers'])} layers",
        "rank": "",
        "parameters": f"{values['parameters_before']:,} -> {values['parameters']:,}",
        "energy kept": f"{values['energy_kept']:.1%}",
    }
    columns |= {"output lost": ""} if values["weighted"] else {}
    rows = [
        (
            layer["name"],
            f"{layer['rank_before']} -> {layer['rank_after']}",
            f"{layer['parameters']:,}",
            f"{layer['energy_kept']:.1%}",
            *([f"{layer['output_lost']:.2%}"] if values["weighted"] else []),
        )
        for layer in values["layers"]
    ]
    title = f"adapter of at most {values['budget']:,} parameters: {values['output']}"
    return layer_table(title, columns, rows)
