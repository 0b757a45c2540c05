"""The quickstart's data set, from a small library written here."""

import itertools
import random
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks.data.stdlib_pairs import read_modules, stdlib_pairs


def write_library(folder, modules, functions):
    for module in range(modules):
        lines = [
            f'def f{module}_{n}(a, b={n}):\n    """Return the sum of module {module} and {n}."""\n'
            for n in range(functions)
        ]
        (folder / f"m{module}.py").write_text("\n".join(lines))
    return folder


def test_functions_are_read_and_never_run(tmp_path):
    (tmp_path / "bomb.py").write_text(
        "raise SystemExit\nclass A:\n  async def go(self, *, x: int = 1):\n"
        '    """Go to the place that x names."""\n'
    )
    (tmp_path / "ends.py").write_text(
        'def f():\n    """Return it all, e.g. from here. Then stop."""\n'
        'def g():\n    """Return\n    it\n    all right now.\n\n    More."""\n'
        'def h():\n    """Is it really the last one? `x` is."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "odd.py").write_bytes(b"\x00")
    (tmp_path / "escape.py").write_text('x = "\\d"\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('def f():\n  """Skip all that is a test."""\n')
    read = read_modules(tmp_path)
    assert read["bomb.py"] == {"go(self, *, x: int=1)": "Go to the place that x names."}
    assert read["ends.py"] == {
        "f()": "Return it all, e.g. from here.",
        "g()": "Return it all right now.",
        "h()": "Is it really the last one?",
    }
    assert not read["broken.py"]
    assert "test/skipped.py" not in read


def test_pairs_are_balanced_apart_between_splits_and_always_the_same(tmp_path):
    train, validation = stdlib_pairs(write_library(tmp_path, 11, 100))
    assert len(train) + len(validation) == 2 * 11 * 100
    assert 0.2 < len(validation) / (len(train) + len(validation)) < 0.35
    for row in itertools.chain(train, validation):
        module, number = str(row["signature"]).partition("(")[0][1:].split("_")
        own = f"Return the sum of module {module} and {number}."
        assert (row["sentence"] == own) == row["label"]
        assert f"of module {module} " in str(row["sentence"])
        assert row["module"] == f"m{module}.py"
    for key in ("sentence", "signature"):  # neither text alone reveals the label
        for rows in (train, validation):
            labels = {}
            for row in rows:
                labels.setdefault(row[key], []).append(row["label"])
            assert all(sorted(seen) == [0, 1] for seen in labels.values())
    for key in ("module", "sentence"):
        assert not {row[key] for row in train} & {row[key] for row in validation}
    random.seed(99)
    assert stdlib_pairs(tmp_path) == (train, validation)


def test_the_quickstarts_files_are_large_balanced_and_shuffled():
    folder = Path(__file__).parents[2] / "examples" / "stdlib"
    train, validation = (
        pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "validation")
    )
    assert len(train) > 4000
    assert len(validation) > 1000
    for rows in (train, validation):
        assert sum(int(row["label"]) for row in rows) * 2 == len(rows)
        assert 0.3 < sum(int(row["label"]) for row in rows[:200]) / 200 < 0.7
