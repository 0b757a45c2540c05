"""`dynlora predict RUN FILE`: write a finished run's predictions for each row of a file."""

from typing import Any

import click
from rich.text import Text

from dynlora.cli.arguments import COUNT, FILE, LOADED_RUN, OVERWRITE, Verb, open_run, option
from dynlora.cli.output import Output, readable_messages


def _run(given: Any, output: Output) -> None:
    from dynlora.train.data.splits import find_inputs
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


COMMAND = Verb(
    "predict",
    "predictions of a finished run's model for each row of FILE",
    _run,
    [
        *LOADED_RUN,
        click.Argument(
            ["file"],
            type=FILE,
            metavar="FILE",
            help="Rows with the run's columns, or a folder of images; labels are not needed.",
        ),
        option(
            "--max-new-tokens N",
            "Maximum tokens to write per row (default: the run's data.max_new_tokens).",
            COUNT,
        ),
        option(
            "--output FILE",
            "A new .jsonl, .csv or .parquet file (default: JSON lines on standard output).",
            FILE,
        ),
        OVERWRITE,
    ],
)
