"""A shift to another domain: opinions on books to learn from, and on kitchen goods to be tested on.

    python -m benchmarks.derive_shift DATA OUT

DATA holds blitzer_books and blitzer_kitchen, each as train.parquet and validation.parquet with the
columns `text` and `label`. `books_to_kitchen` has the first's splits and all of the second as test.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ["text", "label"]
SPLITS = ("train", "validation")


def main() -> None:
    """Write the task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    read = {
        (domain, split): pq.read_table(
            options.data / f"blitzer_{domain}" / f"{split}.parquet", columns=COLUMNS
        )
        for domain in ("books", "kitchen")
        for split in SPLITS
    }
    tables = {split: read["books", split] for split in SPLITS}
    tables["test"] = pa.concat_tables([read["kitchen", split] for split in SPLITS])
    folder = options.out / "books_to_kitchen"
    folder.mkdir(parents=True, exist_ok=True)
    for split, table in tables.items():
        pq.write_table(table, folder / f"{split}.parquet")
        print(f"books_to_kitchen, {split}: {table.num_rows} rows")


if __name__ == "__main__":
    main()
