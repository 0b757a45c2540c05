"""A file that appears whole or not at all, and never in the place of one that must not be lost."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynlora.errors import ConfigError


def check_replaceable(output: Path, *, overwrite: bool) -> None:
    """Check that a file can come to lie at `output`.

    Raises:
        ConfigError: If a folder is there, or a file that may not be replaced.
    """
    if output.is_dir():
        raise ConfigError(f"`--output` must be a file, got {output}, a folder: give a file in it.")
    if output.exists() and not overwrite:
        raise ConfigError(
            f"`--output` must be a new file, got {output}, a file that exists: give another, or "
            "--overwrite to replace it."
        )


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """Give a file to write, which becomes `output` if nothing is raised.

    It is made at once, so that a disk that refuses is found before what is to be written is
    computed.

    Raises:
        ConfigError: If the disk refuses.
    """
    draft = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
        yield draft
        draft.replace(output)
    except OSError as error:
        raise ConfigError(f"`--output` {output} could not be written: {error}.") from error
    finally:
        if draft.exists():
            draft.unlink()
