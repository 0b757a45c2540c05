"""Create the output folder of a verb, and copy the files beside an adapter into it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynlora.errors import AdapterError
from dynlora.files.whole import whole_folder

COMPANIONS = (
    "README.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""Files to copy with an adapter's weights."""


def check_free(output: Path) -> None:
    """Check that `output` can become a new folder.

    Raises:
        AdapterError: If `output` or a parent is a file, or `output` is not empty or has no name.
    """
    if output.name in ("", ".."):  # the draft is a sibling, renamed at the end
        raise AdapterError(f"`--output` must be the name of a folder, got {output}: give one.")
    for path in (output, *output.parents):
        if path.exists() and not path.is_dir():
            raise AdapterError(
                f"`--output` must be a folder, got {output}, but {path} is a file: give another."
            )
    if output.is_dir() and any(output.iterdir()):
        raise AdapterError(
            f"`--output` must be a new or empty folder, got {output}, which holds "
            f"{sum(1 for _ in output.iterdir())} entries: give another, or remove it."
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `output` unless an error is raised.

    Raises:
        AdapterError: If `output` is not free or cannot be written.
    """
    check_free(output)
    try:
        with whole_folder(output) as draft:
            yield draft
    except OSError as error:
        raise AdapterError(f"{output} could not be written: {error}.") from error


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer and model card from an adapter's folder.

    Links are skipped, because in an untrusted folder they may lead to any file.
    """
    for name in COMPANIONS:
        path = source / name
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, target / name)
