"""Build the quickstart's data set: does this sentence describe this Python function?

    python -m benchmarks.data.stdlib_pairs examples/stdlib

The source of the installed standard library is parsed but never imported. A negative has the
sentence of another function of the same module, so vocabulary alone does not reveal the label.
Splits share no module and no sentence. The result depends only on the Python version, which was
3.11 for the files in the examples.
"""

import ast
import random
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SEED = 0
VALIDATION_SHARE = 0.25
SENTENCE_LENGTH = (20, 200)
"""Minimum and maximum sentence length in characters."""
SIGNATURE_LENGTH = 200
"""Maximum signature length in characters."""
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Pair = dict[str, str | int]
"""A row: `sentence`, `signature`, `label`, `module`."""


def stdlib_pairs(folder: Path | None = None) -> tuple[list[Pair], list[Pair]]:
    """Return the shuffled training and validation rows, from the running Python or a `folder`."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    modules = _unique_sentences(read_modules(root))
    count = sum(len(functions) for functions in modules.values())
    rng = random.Random(SEED)
    names = sorted(modules)
    rng.shuffle(names)
    train: list[Pair] = []
    validation: list[Pair] = []
    for name in names:
        held_out = len(validation) < 2 * VALIDATION_SHARE * count
        (validation if held_out else train).extend(_pairs(name, modules[name], rng))
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def read_modules(root: Path) -> dict[str, dict[str, str]]:
    """Return the first docstring sentence per signature, per module under `root`."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED.isdisjoint(parts):
            modules["/".join(parts)] = dict(_functions(path))
    return modules


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings(action="ignore"):  # invalid escape sequences
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # a template, or a file for another version of Python
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        signature = f"{node.name}({ast.unparse(node.args)})"
        sentence = first_sentence(ast.get_docstring(node) or "")
        low, high = SENTENCE_LENGTH
        if low <= len(sentence) <= high and len(signature) <= SIGNATURE_LENGTH:
            yield signature, sentence


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring's first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n", 1)[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`'\"])", paragraph, maxsplit=1)[0]


def _unique_sentences(modules: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Drop repeated sentences, and then modules with fewer than two functions."""
    uses = Counter(sentence for functions in modules.values() for sentence in functions.values())
    kept = {
        name: {sig: sentence for sig, sentence in functions.items() if uses[sentence] == 1}
        for name, functions in modules.items()
    }
    return {name: functions for name, functions in kept.items() if len(functions) > 1}


def _pairs(module: str, functions: dict[str, str], rng: random.Random) -> Iterator[Pair]:
    """Yield a positive and a negative row per function of a module, each sentence once as each."""
    signatures = sorted(functions)
    rng.shuffle(signatures)
    for place, signature in enumerate(signatures):
        other = functions[signatures[place - 1]]
        for sentence, label in ((functions[signature], 1), (other, 0)):
            yield {"sentence": sentence, "signature": signature, "label": label, "module": module}


def main(output: Path) -> None:
    """Write both splits to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("train", "validation"), stdlib_pairs(), strict=True):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, output / f"{split}.parquet", compression="zstd")
        print(f"{split}: {len(rows)} pairs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
