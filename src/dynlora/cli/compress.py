"""`dynlora compress ADAPTER --budget N --output DIR`: cut a LoRA adapter without training."""

from collections.abc import Mapping
from typing import Any

import click
from rich.table import Table

from dynlora.cli.arguments import ADAPTER, FILE, NEW_FOLDER, Verb
from dynlora.cli.output import Output, layer_table, readable_messages
from dynlora.errors import ConfigError

ROWS = 256  # default number of rows to read from the data


def _run(given: Any, output: Output) -> None:
    _check_options(given)
    budget = _read_budget(given.budget)

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
    title = f"adapter of at most {parameters:,} parameters: {given.output}"
    output.show(cut_table(title, values, rank="rank_after"), values)


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


def cut_table(title: str, values: Mapping[str, Any], *, rank: str) -> Table:
    """Return a table of a rewritten adapter's layers; `rank` is the key of their new ranks."""
    weighted = values.get("weighted", False)
    columns = {
        "layer": f"{len(values['layers'])} layers",
        "rank": "",
        "parameters": f"{values['parameters_before']:,} -> {values['parameters']:,}",
        "energy kept": f"{values['energy_kept']:.1%}" if "energy_kept" in values else "",
    }
    columns |= {"output lost": ""} if weighted else {}
    rows = [
        (
            layer["name"],
            f"{layer['rank_before']} -> {layer[rank]}",
            f"{layer['parameters']:,}",
            f"{layer['energy_kept']:.1%}",
            *([f"{layer['output_lost']:.2%}"] if weighted else []),
        )
        for layer in values["layers"]
    ]
    return layer_table(title, columns, rows)


COMMAND = Verb(
    "compress",
    "cut any LoRA adapter down to a budget, no training",
    _run,
    [
        ADAPTER,
        click.Option(
            ["--budget"],
            required=True,
            metavar="N",
            help="Maximum LoRA parameters, or a percentage of the adapter's, such as 50%.",
        ),
        NEW_FOLDER,
        click.Option(
            ["--data"],
            type=FILE,
            metavar="FILE",
            help="Texts (.parquet, .csv, .jsonl) on which the layers' outputs are preserved.",
        ),
        click.Option(["--text"], metavar="COLUMN", help="With --data: column of the texts."),
        click.Option(
            ["--text-pair"], metavar="COLUMN", help="With --data: column of second texts, if any."
        ),
        click.Option(
            ["--rows"], type=int, metavar="N", help=f"With --data: rows to read (default: {ROWS})."
        ),
        click.Option(
            ["--model"],
            metavar="PATH",
            help="With --data: folder, GGUF file or hub name of the base model, if the adapter "
            "does not name an existing folder.",
        ),
    ],
)
