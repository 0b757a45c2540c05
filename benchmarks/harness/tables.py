"""Convert a study's records to three texts and back: runs, shared values and changed ranks.

The table of runs has one row per run and one column per value that differs between runs. Nested
keys are joined by dots. A cell contains JSON, or a plain string that is not valid JSON; an empty
cell is a missing key.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dynlora.files.json_files import finite

RUNS, SHARED, RANKS = ".csv", ".config.json", ".ranks.csv"
ENDINGS = (RUNS, SHARED, RANKS)
"""Endings of a study's files: one row per run, what the runs share, one row per changed rank."""
FORMAT = 1
FIRST = (
    "kind", "model", "task", "method", "budget", "seed", "trial", "key", "status",
    "versions.dynlora", "moved",
)  # fmt: skip
"""Columns of every table. `versions.dynlora` names the commit; `moved` is whether a rank changed
during the run."""
NOT_KEPT = ("seconds", "initial_ranks", "final_ranks", "rank_changes")
"""Keys without a column. Ranks have their own table. Wall times are not comparable, because runs
share machines with other runs and may resume on another."""
RANK_HEAD = ("key", "step", "layer", "rank")
Record = Mapping[str, Any]
Change = tuple[int, str, int | None]
"""Step, layer and its rank from this step on; step 0 is the start."""


def to_texts(records: Iterable[Record]) -> dict[str, str]:
    """Return a study's files as texts, by ending; the order of records does not matter."""
    layouts: list[list[str]] = []
    rows, ranks = [], []
    for record in sorted(records, key=_order):
        base, layers, changes = _split_ranks(record)
        if layers not in layouts:
            layouts.append(layers)
        kept = {key: value for key, value in record.items() if key not in NOT_KEPT}
        kept |= {"layers": layouts.index(layers), "rank": base}
        kept["moved"] = any(step > 0 for step, *_ in changes)
        rows.append({key: json.dumps(finite(value)) for key, value in _flat(kept)})
        ranks += [(record["key"], step, name, rank) for step, name, rank in changes]
    columns = sorted({column for row in rows for column in row} - set(FIRST))
    common = [column for column in columns if len({row.get(column) for row in rows}) == 1]
    varying = [*FIRST, *(column for column in columns if column not in common)]
    shared = _nested({column: json.loads(rows[0][column]) for column in common})
    facts = {"format": FORMAT, "shared": shared, "layers": layouts}
    return {
        RUNS: _csv(varying, ([_cell(row.get(c, "")) for c in varying] for row in rows)),
        SHARED: json.dumps(facts, indent=1) + "\n",
        RANKS: _csv(RANK_HEAD, ranks),
    }


def from_texts(texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the records in the texts of a study's files.

    Raises:
        ValueError: If a text is damaged or has a newer format.
    """
    facts = json.loads(texts[SHARED])
    try:
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, where {FORMAT} is known")
        shared, layouts = dict(_flat(facts["shared"])), facts["layers"]
        changes: dict[str, list[Change]] = {}
        for key, step, name, rank in _rows(texts[RANKS], RANK_HEAD):
            changes.setdefault(key, []).append((int(step), name, int(rank) if rank else None))
        records = []
        for cells in _rows(texts[RUNS], FIRST):
            flat = shared | cells
            del flat["moved"]
            layers, base = layouts[flat.pop("layers")], flat.pop("rank")
            record = _nested(flat)
            records.append(record | _join_ranks(base, layers, changes.get(record["key"], [])))
    except (KeyError, TypeError, IndexError, csv.Error) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return records


def _order(record: Record) -> tuple[Any, ...]:
    trial = -1 if record.get("trial") is None else record["trial"]
    names = ("kind", "model", "task", "budget", "method", "seed")
    return (*(record[name] for name in names), trial, record["key"])


def _split_ranks(record: Record) -> tuple[int | None, list[str], list[Change]]:
    """Return the most common initial rank, all layers, and every deviation from that rank."""
    final = record.get("final_ranks") or {}
    initial = record.get("initial_ranks") or {}
    if not initial and set(final.values()) == {record["budget"]}:
        initial = final  # methods with fixed ranks may omit their initial ranks
    layers = [*final, *(name for name in initial if name not in final)]
    base = Counter(initial.values()).most_common(1)[0][0] if initial else None
    live: dict[str, int | None] = dict.fromkeys(layers, base)
    made: list[Change] = []
    later = [tuple(change) for change in record.get("rank_changes") or ()]
    for step, name, rank in [*((0, name, initial.get(name)) for name in layers), *later]:
        if live[name] != rank:
            made.append((step, name, rank))
            live[name] = rank
    end = record.get("steps") or 0
    made += [(end, name, final.get(name)) for name in layers if live[name] != final.get(name)]
    return base, layers, made


def _join_ranks(
    base: int | None, layers: Sequence[str], changes: Sequence[Change]
) -> dict[str, Any]:
    """Return the ranks of a run from the result of `_split_ranks`."""
    live = dict.fromkeys(layers, base)
    live |= {name: rank for step, name, rank in changes if step == 0}
    later = [change for change in changes if change[0] > 0]
    ends = live | {name: rank for _, name, rank in later}
    return {
        "initial_ranks": {name: rank for name, rank in live.items() if rank is not None},
        "final_ranks": {name: rank for name, rank in ends.items() if rank is not None},
        "rank_changes": [list(change) for change in later],
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inside = found
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return found


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def _rows(text: str, needed: Sequence[str]) -> Iterator[Any]:
    """Yield the rows of a table: lists for the table of ranks, else values by column."""
    reader = csv.reader(io.StringIO(text))
    head = next(reader, [])
    if head[: len(needed)] != list(needed):
        raise ValueError(f"a head of {head[: len(needed)]}, where {list(needed)} must stand")
    for row in reader:
        if len(row) != len(head):
            raise ValueError(f"line {reader.line_num} with {len(row)} of {len(head)} cells")
        if needed is RANK_HEAD:
            yield row
        else:
            yield {name: _value(cell) for name, cell in zip(head, row, strict=True) if cell}


def _cell(text: str) -> str:
    """Return a cell for JSON, without quotes if the plain string is not valid JSON."""
    if text.startswith('"'):
        plain: str = json.loads(text)
        return plain if plain and _value(plain) is plain else text
    return text


def _value(cell: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError:
        return cell
