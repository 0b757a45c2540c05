"""A CSV table that grows by one line per finished run, so that a kill loses no finished run."""

import csv
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class AppendedTable:
    """Rows of one CSV file; values are JSON, or plain text where it is not also JSON."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        """Read the finished rows, and cut a line that a killed process left incomplete.

        Args:
            path: The file, which is created with the first row.
            columns: Names of all columns, in the order of the file.
        """
        self.path = path
        self.columns = list(columns)
        self.rows: list[Row] = []
        if path.exists():
            _cut_incomplete_line(path)
            self.rows = read_rows(path)

    def find(self, **wanted: Any) -> Row | None:
        """Return the first row with these values; None without one."""
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def select(self, **wanted: Any) -> list[Row]:
        """Return all rows with these values."""
        return select(self.rows, **wanted)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row to the disk.

        Raises:
            KeyError: If the row has a column that the table lacks.
        """
        if unknown := row.keys() - set(self.columns):
            raise KeyError(f"`columns` must contain every key of a row, but lacks {unknown}.")
        line = StringIO()
        writer = csv.writer(line, lineterminator="\n")
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer.writerow(self.columns)
        writer.writerow([_to_text(row.get(column)) for column in self.columns])
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(dict(row))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows with these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def read_rows(path: Path) -> list[Row]:
    """Return all rows of a file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: _from_text(text) for name, text in row.items()} for row in csv.DictReader(file)
        ]


def _to_text(value: Any) -> str:
    if isinstance(value, str) and _from_text(value) is value:
        return value
    return json.dumps(value)


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def current_commit() -> str:
    """Return the commit of the running code, with a plus sign if files differ from it."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cut_incomplete_line(path: Path) -> None:
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
