"""Predict rows with a finished run, and write rows with predictions as lines or to a file."""

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
from dynlora.files import whole
from dynlora.files.json_files import finite
from dynlora.files.tables import without_times
from dynlora.train.data.splits import RawSplit
from dynlora.train.finished_run import FinishedRun
from dynlora.train.task import Predictor

ROWS_AT_ONCE = 256
Row = dict[str, Any]


def predict_rows(run: FinishedRun, split: RawSplit, batch_size: int | None) -> Iterator[Row]:
    """Yield one JSON-ready prediction per row, in row order; labels are not needed.

    There is no autocast. Without `batch_size`, the run's `training.eval_batch_size` counts.

    Raises:
        DataError: If a column is missing or named as a prediction field, or a row is invalid.
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


def exact_match(run: FinishedRun, split: RawSplit, batch_size: int | None) -> float:
    """Return the share of rows whose predicted text is a right one, apart from spaces around it.

    Raises:
        ConfigError: If the run's rows have no answers to write.
        DataError: As in `predict_rows`.
    """
    if run.task.answers is None:
        raise ConfigError(
            "`--exact-match` needs a run that writes texts (causal_lm, image_text_to_text), got "
            f"one of {run.config.task}: leave it out."
        )
    answers = run.task.answers(split, run.config.data)
    right = [
        said["prediction"].strip() in map(str.strip, texts)
        for said, texts in zip(predict_rows(run, split, batch_size), answers, strict=True)
    ]
    return sum(right) / len(right)


def _named(prediction: Row, names: Sequence[str]) -> Row:
    """Add the class name, or names, to a prediction; null if training had no such class."""
    label, name = prediction["prediction"], dict(enumerate(names)).get
    named = [name(each) for each in label] if isinstance(label, list) else name(label)
    return {"prediction": label, "class_name": named, **prediction}


def lines(split: RawSplit, predictions: Iterator[Row]) -> Iterator[str]:
    """Yield one JSON object per row: its columns, without bytes such as images; its prediction."""
    table = split.table.select(
        [place for place, field in enumerate(split.table.schema) if not _holds_bytes(field.type)]
    )
    # Trailing commas in a CSV file make columns without a name.
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
    """Yield the rows of a table, also of a table without columns."""
    for begin in range(0, table.num_rows, ROWS_AT_ONCE):
        # A slice of a table without columns would not end with the table.
        part = table.slice(begin, min(ROWS_AT_ONCE, table.num_rows - begin))
        try:
            yield from part.to_pylist()
        except (ValueError, OverflowError):  # a time out of Python's range, such as year 18029
            columns = [column.cast(without_times(column.type)) for column in part.columns]
            yield from pa.Table.from_arrays(columns, part.column_names).to_pylist()


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_holds_bytes(kind.field(place).type) for place in range(kind.num_fields))


def _write_lines(path: Path, split: RawSplit, predictions: Iterator[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines(split, predictions))


def _write_csv(path: Path, split: RawSplit, predictions: Iterator[Row]) -> None:
    table = _beside(split, [finite(row) for row in predictions])
    # By index, because columns may share a name, such as the empty one.
    kept = [place for place, field in enumerate(table.schema) if not _holds_bytes(field.type)]
    flat = [_flat(table.column(place)) for place in kept]
    names = [table.column_names[place] for place in kept]
    pyarrow.csv.write_csv(pa.Table.from_arrays(flat, names), path)


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Return a column with lists and records as JSON, because CSV cannot contain them."""
    if not pa.types.is_nested(column.type):
        return column
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):
        values = column.cast(without_times(column.type)).to_pylist()
    written = [
        None if value is None else json.dumps(finite(value), ensure_ascii=False, default=str)
        for value in values
    ]
    return pa.array(written, pa.string())


def _write_parquet(path: Path, split: RawSplit, predictions: Iterator[Row]) -> None:
    pyarrow.parquet.write_table(split.table.slice(0, 0), path)  # fail early on unsupported types
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


def check_replaceable(output: Path, *, overwrite: bool) -> None:
    """Refuse an `output` that is a folder, or an existing file without `overwrite`."""
    whole.check_file(output, ConfigError)
    if output.exists() and not overwrite:
        raise ConfigError(
            f"`--output` must be a new file, got {output}, a file that exists: give another, or "
            "--overwrite to replace it."
        )


def check_output(output: Path, *, source: Path | None, overwrite: bool) -> None:
    """Refuse an unknown extension, the file `source` of the rows, or a file not to be replaced."""
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
    """Write rows and predictions to a file atomically.

    Raises:
        ConfigError: If the format does not support the rows.
        DataError: As in `predict_rows`, which is consumed here.
    """
    with whole.whole_file(output) as draft:
        try:
            WRITERS[output.suffix](draft, split, predictions)
        except pa.ArrowException as error:
            raise ConfigError(
                f"`--output` must be a file that can hold the rows, got {output} "
                f"({' '.join(str(error).split())}): give one that ends in .jsonl."
            ) from error
