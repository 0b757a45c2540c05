"""What is asked of the limited process: each function reads a file as the verbs do that take it."""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from dynlora.errors import DynamicLoraError

ENCODINGS = ("strict", "backslashreplace")
"""How Python writes to its standard output and its standard error what UTF-8 has no bytes for."""


def read(name: str, *arguments: Any) -> list[str]:
    """Call one of the functions below by its name."""
    called: Callable[..., list[str]] = globals()[name]
    return called(*arguments)


def run_verb(*arguments: str) -> list[str]:
    """Run a verb of the command line; return its error line, if there is one."""
    from dynlora.cli.main import main

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ENCODINGS)
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) in {(0, 0), (2, 1)}, (code, said)
    return errors


def use_adapter(folder: str) -> list[str]:
    """Show an adapter, rewrite it and cut it, and show what came of that."""
    from dynlora.files.whole import remove

    refused = run_verb("inspect", folder) or run_verb("inspect", folder, "--json")
    refused = refused or run_verb("diff", folder, folder)
    if refused:
        return refused
    single = Path(folder).is_file()
    output = f"{folder}.made.safetensors" if single else f"{folder}/output"
    combining = (
        ("combine", folder, folder),
        ("combine", folder, folder, "--method", "ties", "--rank", "1"),
    )
    for verb in (
        ("export", folder, "--format", "kohya" if single else "native"),
        ("export", folder, "--format", "uniform"),
        *combining,
        ("resize", folder, "--budget", "60%"),
        ("resize", folder, "--rank", "1"),
    ):
        refused = run_verb(*verb, "--output", output, "--quiet")
        if not refused:
            assert run_verb("inspect", output, "--quiet") == []
        remove(Path(output))
        if refused:
            return refused
    return []


def use_run(folder: str, other: str) -> list[str]:
    """Report on a run, and compare it with another one."""
    return (
        run_verb("report", folder, "--output", f"{folder}/page.html")
        or run_verb("compare", folder, other)
        or run_verb("compare", other, folder, "--json")
    )


def read_job(path: str) -> list[str]:
    """Read the configuration of a job."""
    from dynlora.train.config_file import read_job

    return _errors(lambda: read_job(Path(path)))


def read_study(path: str) -> list[str]:
    """Read the configuration of a study."""
    from benchmarks.harness import study

    return _errors(lambda: study.read_study(Path(path)))


def read_rows(path: str, readers: Mapping[str, str]) -> list[str]:
    """Read rows as a job's data, each column by a function."""
    from dynlora.train.config import DataConfig
    from dynlora.train.data import columns
    from dynlora.train.data.splits import RawSplit, load_splits

    def read_column(split: RawSplit, column: str, name: str) -> None:
        key = ["data.text"] if name == "read_texts" else []
        more = [None] if name in ("read_classes", "read_class_lists") else []
        getattr(columns, name)(split, *key, column, *more)

    splits: list[RawSplit] = []
    errors = _errors(lambda: splits.extend(load_splits(DataConfig(path=path))))
    for split in splits:
        for column, name in readers.items():
            errors += _errors(partial(read_column, split, column, name))
    return errors


def _errors(read: Callable[[], object]) -> list[str]:
    try:
        read()
    except DynamicLoraError as error:
        return [str(error)]
    return []
