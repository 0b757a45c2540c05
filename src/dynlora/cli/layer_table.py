"""The table with one line per layer that `inspect`, `export` and `compress` print."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def layer_table(title: str, columns: Mapping[str, str], rows: Iterable[Sequence[str]]) -> Any:
    """Return a table.

    Args:
        title: Its title.
        columns: Footer by heading; the first column has the layers' names, all others numbers.
        rows: Cells of each line.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_footer=True, box=None)
    for heading, footer in columns.items():
        if not table.columns:
            table.add_column(heading, footer, overflow="fold")
        else:
            table.add_column(heading, footer, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    return table
