"""Files of rows to tables: one reader a format, for all that reads rows from a disk."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet


def read_csv(path: Path, texts: Sequence[str]) -> pa.Table:
    """Read a CSV file whose empty cells are missing.

    Args:
        path: The file.
        texts: Columns that hold texts, some of which may look like numbers.
    """
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(texts, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )


TABLES: Mapping[str, Callable[[Path, Sequence[str]], pa.Table]] = {
    ".parquet": lambda path, _: pyarrow.parquet.read_table(path),
    ".csv": read_csv,
    ".jsonl": lambda path, _: pyarrow.json.read_json(path),
}
"""By a file's ending, what reads it, given its columns of texts."""
