"""`dynlora predict RUN FILE`: write a finished run's predictions for each row of a file."""

from collections.abc import Sequence
from pathlib import Path

from dynlora.cli.arguments import VerbParser, parse, verb_parser
from dynlora.cli.output import Output
from dynlora.cli.run_argument import add_run, at_least_one, open_run


def run(arguments: Sequence[str], output: Output) -> None:
    """Run the verb.

    Args:
        arguments: Words after `predict` on the command line.
        output: Shows progress and the result.

    Raises:
        DynamicLoraError: If the user must correct the input.
    """
    given = parse(make_parser(), arguments)
    if given is None:
        return

    # Only now: these load torch, and `--help` need not wait for it.
    from rich.text import Text

    from dynlora.cli.messages import readable_messages
    from dynlora.train.data.selected import find_inputs
    from dynlora.train.predictions import check_output, lines, predict_rows, write_predictions

    if given.output is not None:
        check_output(given.output, source=given.file, overwrite=given.overwrite)
    with readable_messages(output.progress):
        found = open_run(given.run, given.model, given.input_adaptive, given.max_new_tokens)
        rows = find_inputs(found.config.data, found.config.task, given.file)
        predictions = predict_rows(found, rows, given.batch_size)
        count = rows.table.num_rows
        if given.output is not None:
            write_predictions(given.output, rows, predictions)
            where = {"output": str(given.output), "rows": count}
            output.show(Text(f"{count:,} predictions: {given.output}"), where)
        elif output.as_json:
            values = {"rows": count, "predictions": list(predictions)}
            output.show(Text(), values)
        else:
            for line in lines(rows, predictions):
                output.line(line)


def make_parser() -> VerbParser:
    """Return the verb's parser."""
    parser = verb_parser("predict")
    add_run(parser)
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="rows with the columns that the run learned from, or a folder of images; labels are "
        "not needed",
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=at_least_one,
        help="causal_lm: most tokens to write for a row (default: the run's data.max_new_tokens)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="a new .jsonl, .csv or .parquet file (default: JSON lines on the standard output)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output if it is there"
    )
    return parser
