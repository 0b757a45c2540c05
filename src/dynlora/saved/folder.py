"""The new folder of a verb's `--output`, and what goes into it beside an adapter."""

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
"""What may lie beside an adapter's weights and go with them."""


def check_free(output: Path) -> None:
    """Check that a new folder can come to lie at `output`.

    Raises:
        AdapterError: If a file, or a folder that holds anything, is there, or it has no name.
    """
    if output.name in ("", ".."):  # a folder is written beside its place, and moved there
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
    """Give a folder to write into, which becomes `output` if nothing is raised.

    Raises:
        AdapterError: If there is something at `output`, or the disk refuses.
    """
    check_free(output)
    try:
        with whole_folder(output) as draft:
            yield draft
    except OSError as error:
        raise AdapterError(f"{output} could not be written: {error}.") from error


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer and the model card, if they are files of the folder's own.

    A link is left: in a folder from elsewhere it may lead to a file that is none of its business.
    """
    for name in COMPANIONS:
        path = source / name
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, target / name)
