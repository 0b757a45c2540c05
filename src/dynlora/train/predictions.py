"""Predictions of a finished run beside the rows that they are for, as they come or into a file."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch

from dynlora.errors import ConfigError, DataError
from dynlora.files.json_files import finite
from dynlora.saved.tables import without_times
from dynlora.train.finished_run import FinishedRun
from dynlora.train.new_file import check_replaceable, new_file
from dynlora.train.sources import RawSplit
from dynlora.train.task import Predictor

ROWS_AT_ONCE = 256
"""Rows of a table that are made into Python's values at a time."""
Row = dict[str, Any]


def predict_rows(run: FinishedRun, split: RawSplit, batch_size: int | None) -> Iterator[Row]:
    """Yield what the model says to each row, in their order; JSON-ready.

    Predictions are computed in float32 whatever `training.bf16` was.

    Args:
        run: As loaded.
        split: Rows, whose labels are not needed.
        batch_size: Rows in a forward pass; None takes the run's `training.eval_batch_size`.

    Raises:
        DataError: If a column is missing, a row does not hold what the task needs, or the rows have
            a column that a prediction would have too.
    """
    model = run.model
    if torch.accelerator.is_available() and run.config.model.quantization is None:
        model = model.to(torch.accelerator.current_accelerator())
    size = batch_size or run.config.training.eval_batch_size
    predictor = Predictor(model=model, processor=run.processor, batch_size=size)
    for said in run.task.predict(predictor, split, run.config.data):
        prediction = said if run.class_names is None else _named(said, run.class_names)
        taken = [name for name in prediction if name in split.table.column_names]
        if taken:
            raise DataError(
                f"FILE must leave the names {', '.join(prediction)} to the predictions, got "
                f"{split.source} with the column {taken[0]!r}: rename it."
            )
        yield prediction


def _named(prediction: Row, names: Sequence[str]) -> Row:
    """Return a prediction of a class with its name, null where the run's data had no such one."""
    label = prediction["prediction"]
    name = names[label] if label < len(names) else None
    return {"prediction": label, "class_name": name, **prediction}


def lines(split: RawSplit, predictions: Iterator[Row]) -> Iterator[str]:
    """Yield one JSON object a row: its columns, then its prediction.

    Columns that hold bytes, such as images, are left out: JSON has none.
    """
    table = split.table.select(
        [place for place, field in enumerate(split.table.schema) if not _holds_bytes(field.type)]
    )
    # Columns without a name are what a row's commas at its end make.
    twice = [name for name, count in Counter(table.column_names).items() if name and count > 1]
    if twice:
        raise DataError(
            f"FILE must have each column once for JSON lines, got {split.source} with "
            f"{len(table.column_names)} columns of which several are named {twice[0]!r}: rename "
            "them, or write a file that ends in .csv or .parquet."
        )
    for row, prediction in zip(_rows(table), predictions, strict=True):
        yield json.dumps(finite({**row, **prediction}), ensure_ascii=False, default=str)


def _rows(table: pa.Table) -> Iterator[Row]:
    """Yield the rows of a table, which may have none of its columns left."""
    for begin in range(0, table.num_rows, ROWS_AT_ONCE):
        part = table.slice(begin, ROWS_AT_ONCE)
        try:
            yield from part.to_pylist()
        except (ValueError, OverflowError):  # a time that Python has none for, as the year 18029
            columns = [_with_times_as_texts(column) for column in part.columns]
            yield from pa.Table.from_arrays(columns, part.column_names).to_pylist()


def _with_times_as_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column whose dates and times, also in lists and records, are written out."""
    return column.cast(without_times(column.type))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_holds_bytes(kind.field(place).type) for place in range(kind.num_fields))


def _write_lines(path: Path, split: RawSplit, predictions: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines(split, predictions))


def _write_csv(path: Path, split: RawSplit, predictions: Iterator[Row]) -> None:
    table = _beside(split, [finite(row) for row in predictions])
    # By place: of two columns with one name, such as none at all, each is written.
    kept = [place for place, field in enumerate(table.schema) if not _holds_bytes(field.type)]
    flat = [_flat(table.column(place)) for place in kept]
    names = [table.column_names[place] for place in kept]
    pyarrow.csv.write_csv(pa.Table.from_arrays(flat, names), path)


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Return a column whose lists and records, which CSV cannot hold, are written as JSON."""
    if not pa.types.is_nested(column.type):
        return column
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):
        values = _with_times_as_texts(column).to_pylist()
    written = [
        None if value is None else json.dumps(finite(value), ensure_ascii=False, default=str)
        for value in values
    ]
    return pa.array(written, pa.string())


def _write_parquet(path: Path, split: RawSplit, predictions: Iterator[Row]) -> None:
    pyarrow.parquet.write_table(split.table.slice(0, 0), path)  # what it cannot hold is told early
    pyarrow.parquet.write_table(_beside(split, list(predictions)), path)


def _beside(split: RawSplit, predictions: Sequence[Row]) -> pa.Table:
    table, made = split.table, pa.Table.from_pylist(predictions)
    for name in made.column_names:
        table = table.append_column(name, made[name])
    return table


WRITERS: Mapping[str, Callable[[Path, RawSplit, Iterator[Row]], None]] = {
    ".jsonl": _write_lines,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
"""By a file's ending, what writes it."""


def check_output(output: Path, *, source: Path | None, overwrite: bool) -> None:
    """Check that predictions can be written to a file.

    Args:
        output: The file.
        source: The file that the rows are read from, if any: never overwritten.
        overwrite: Whether another file may be.

    Raises:
        ConfigError: If its ending is not known, or something is there that must not be lost.
    """
    if output.suffix not in WRITERS:
        raise ConfigError(
            f"`--output` must end in {', '.join(WRITERS)}, got {output.name!r}: give another."
        )
    check_replaceable(output, overwrite=overwrite)
    if source is not None and source.exists() and output.exists() and output.samefile(source):
        raise ConfigError(
            f"`--output` must be another file than FILE, got {output} for both: give another."
        )


def write_predictions(output: Path, split: RawSplit, predictions: Iterator[Row]) -> None:
    """Write rows and predictions to a file: whole, or not at all.

    Raises:
        ConfigError: If the disk refuses, or the format cannot hold the rows.
        DataError: As `predict_rows`, which is asked here.
    """
    with new_file(output) as draft:
        try:
            WRITERS[output.suffix](draft, split, predictions)
        except pa.ArrowException as error:
            raise ConfigError(
                f"`--output` must be a file that can hold the rows, got {output} "
                f"({' '.join(str(error).split())}): give one that ends in .jsonl."
            ) from error
