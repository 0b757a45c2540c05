"""`dynlora resize ADAPTER --budget N --output DIR`: give a LoRA adapter other ranks, untrained."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from dynlora.adapter_files.formats import DIFFUSERS, PEFT
from dynlora.cli.arguments import ADAPTER, COUNT, FILE, NEW_ADAPTER, RELATIVE_ERROR, Verb, option
from dynlora.cli.output import Output, layer_table, readable_messages
from dynlora.errors import ConfigError

ROWS = 256  # default number of rows to read from the data


def _run(given: Any, output: Output) -> None:
    _check_options(given)

    from dynlora.adapter_files.reader import read_any
    from dynlora.adapter_files.resize import (
        check_affordable,
        plan_budget,
        plan_error,
        plan_rank,
        resize,
    )
    from dynlora.adapter_files.writer import check_free

    check_free(given.output, DIFFUSERS if given.adapter.is_file() else PEFT)
    adapter = read_any(given.adapter)
    parameters = None
    if given.budget is not None:
        parameters = _read_budget(given.budget, adapter.parameters)
        check_affordable(adapter, parameters)  # before the texts are read
    seen = None if given.data is None else _observe(adapter, given, output)
    if parameters is not None:
        ranks = plan_budget(adapter, parameters, seen)
    elif given.rank is not None:
        ranks = plan_rank(adapter, given.rank)
    else:
        ranks = plan_error(adapter, given.error, seen)
    made = resize(adapter, ranks, given.output, seen)
    values = {"output": str(given.output), "budget": parameters, **made.to_dict()}
    title = f"adapter of {made.parameters:,} parameters: {given.output}"
    output.show(rank_table(title, values), values)


def _check_options(given: Any) -> None:
    sizes = [f"`--{name}`" for name in ("rank", "budget", "error") if vars(given)[name] is not None]
    if len(sizes) != 1:
        raise ConfigError(
            "exactly one of `--rank`, `--budget` and `--error` must be given, but got "
            f"{' and '.join(sizes) or 'none'}."
        )
    for key in ("text", "text_pair", "rows", "model"):
        if given.data is None and vars(given)[key] is not None:
            name = key.replace("_", "-")
            raise ConfigError(f"`--{name}` needs `--data FILE`. Add it, or leave `--{name}` out.")
    if given.data is not None and given.text is None:
        raise ConfigError("`--data` needs the column of its texts. Add `--text COLUMN`.")


def _read_budget(text: str, parameters: int) -> int:
    """Return a budget, perhaps a percentage of the adapter's parameters."""
    try:
        budget = int(parameters * float(text[:-1]) / 100) if text[-1:] == "%" else int(text)
    except (ValueError, OverflowError):
        budget = 0
    if budget < 1:
        raise ConfigError(
            "`--budget` must be a number of parameters of at least 1, or a percentage of the "
            f"adapter's {parameters}, but got {text}."
        )
    return budget


def _observe(adapter: Any, given: Any, output: Output) -> Any:
    """Return statistics of the adapter's layers on the texts."""
    from dynlora.adapter_files.activations import batch_texts, check_reads_texts, observe_texts
    from dynlora.adapter_files.adapter_base import attach, load_base, locate_base
    from dynlora.adapter_files.base_models import position_limit
    from dynlora.train.pretrained import load_tokenizer

    texts = _read_texts(given)
    source = locate_base(adapter, given.model)
    with readable_messages(output.progress):
        base = load_base(adapter, source)
        check_reads_texts(base, source)
        batches = batch_texts(texts, load_tokenizer(source, 1), position_limit(base))
        output.progress.print(f"reading {len(texts[0])} rows of {given.data}")
        return observe_texts(attach(adapter.folder, base), adapter, batches)


def _read_texts(given: Any) -> list[list[str]]:
    """Return the columns of texts, from rows spread over the file."""
    from dynlora.train.config import DataConfig
    from dynlora.train.data.columns import read_texts
    from dynlora.train.data.splits import read_file

    config = DataConfig(path=str(given.data), text=given.text, text_pair=given.text_pair)
    split = read_file("given", given.data, config)
    count, most = split.table.num_rows, given.rows or ROWS
    step = max(1, count / most)
    split = split.take(sorted({int(row * step) for row in range(min(most, count))}))
    texts = [read_texts(split, "--text", given.text)]
    if given.text_pair is not None:
        texts.append(read_texts(split, "--text-pair", given.text_pair))
    return texts


def rank_changes(before: Mapping[str, int], made: Any) -> list[dict[str, Any]]:
    """Return each layer of a new adapter in figures, beside its ranks before by name."""
    return [
        {
            "name": layer.name,
            "rank_before": before[layer.name],
            "rank_after": layer.r,
            "parameters": layer.parameters,
        }
        for layer in made.layers
    ]


def rank_table(title: str, values: Mapping[str, Any]) -> Table:
    """Return a table of the new ranks of an adapter's layers, and of what each keeps, if known."""
    layers = values["layers"]
    columns = {
        "layer": ("{name}", f"{len(layers)} layers"),
        "rank": ("{rank_before} -> {rank_after}", ""),
        "parameters": (
            "{parameters:,}",
            f"{values['parameters_before']:,} -> {values['parameters']:,}",
        ),
    }
    if "energy_kept" in layers[0]:
        kept = f"{values['energy_kept']:.1%}" if "energy_kept" in values else ""
        columns["energy kept"] = ("{energy_kept:.1%}", kept)
    if layers[0].get("output_lost") is not None:
        columns["output lost"] = ("{output_lost:.2%}", "")
    return layer_table(title, columns, layers)


COMMAND = Verb(
    "resize",
    "other ranks for a LoRA adapter: one, or by a budget or error",
    _run,
    [
        ADAPTER,
        NEW_ADAPTER,
        option("--rank R", "Rank of all layers.", COUNT),
        option(
            "--budget N", "Maximum LoRA parameters, or a percentage of the adapter's, such as 50%."
        ),
        option(
            "--error E",
            "Largest relative error of a layer, such as 0.1: of its output with --data, else "
            "of its update (Frobenius norm).",
            RELATIVE_ERROR,
        ),
        option(
            "--data FILE",
            "Texts (.parquet, .csv, .jsonl, .json) on which layers' outputs are preserved.",
            FILE,
        ),
        option("--text COLUMN", "With --data: column of the texts."),
        option("--text-pair COLUMN", "With --data: column of second texts, if any."),
        option("--rows N", f"With --data: rows to read (default: {ROWS}).", COUNT),
        option(
            "--model PATH",
            "With --data: folder, GGUF file or hub name of the base model, if the adapter "
            "does not name an existing folder.",
        ),
    ],
)
