"""Atomic writes of files and folders: to a draft beside the target, which is then renamed.

Readers see the old or the new content, and concurrent writers do not collide.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from dynlora.errors import DynamicLoraError

DRAFT = ".dynlora-"  # names of drafts, of running or killed processes, begin so


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link but not its target, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _draft_of(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, which replaces it on success and is removed on an exception."""
    path = path.resolve()
    draft = path.with_name(f"{DRAFT}{uuid4().hex}")  # with `path`'s name it could be too long
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            yield draft
            draft.replace(path)
    finally:
        remove(draft)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a draft, which replaces `path` on success and is removed on an exception.

    The draft is created first, so that disk errors appear before the content is computed. Of a
    link, the target is written.
    """
    with _draft_of(path) as draft:
        draft.touch(exist_ok=False)
        yield draft


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to errors without a file name, such as the error for a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a draft folder, which becomes `path` on success and is removed on an exception.

    `path` may be an empty folder, or a link to one.
    """
    with _draft_of(path) as draft:
        draft.mkdir()
        yield draft
        # Some libraries restrict their files to the owner: set the permissions of new files.
        for inside in draft.rglob("*"):
            if inside.is_file():
                inside.chmod(draft.stat().st_mode & 0o666)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, atomically."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def check_file(path: Path, error: type[DynamicLoraError]) -> None:
    """Raise `error` if `--output` exists and is no file."""
    if path.is_dir():
        raise error(f"`--output` must be a file, got {path}, which is a folder: give a file in it.")
    if path.exists() and not path.is_file():
        raise error(
            f"`--output` must be a file, got {path}, which is a device or a pipe: give another."
        )
