"""Files and folders that appear whole or not at all.

Each is written under a name of its own beside its place, and moved there at the end: who reads it
meanwhile sees the old content or the new, and processes that write to one place do not meet.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from dynlora.errors import DynamicLoraError

_DRAFT = ".dynlora-"


def _draft_of(path: Path) -> Path:
    """Return a free name beside a path; not made from its own, which may be as long as can be."""
    return path.with_name(f"{_DRAFT}{uuid4().hex}")


def drafts_in(folder: Path) -> list[Path]:
    """Return what processes that were killed while they wrote, or that still write, left there."""
    return list(folder.glob(f"{_DRAFT}*"))


def remove(path: Path) -> None:
    """Remove a file, a folder with its content, or a link without its target, if it is there.

    Raises:
        OSError: If the disk refuses.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a file to write, which becomes `path` if nothing is raised, and else is removed.

    It is made at once, so that a disk that refuses is found before what is to be written is
    computed.

    Raises:
        OSError: If the disk refuses.
    """
    draft = _draft_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            draft.touch(exist_ok=False)
            yield draft
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let what a disk refuses name the file: of a full one, Python tells the reason alone.

    Raises:
        OSError: If the disk refuses.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `path` if nothing is raised, and else is removed.

    Its files can be read by those who can read any new file: some libraries let the owner alone.

    Raises:
        OSError: If the disk refuses, or `path` is anything but missing or an empty folder.
    """
    draft = _draft_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.mkdir()
        yield draft
        for inside in draft.rglob("*"):
            if inside.is_file():
                inside.chmod(draft.stat().st_mode & 0o666)
        draft.replace(path)
    finally:
        if draft.exists():
            shutil.rmtree(draft)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, atomically.

    Raises:
        OSError: If the disk refuses.
    """
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def check_replaceable(
    path: Path,
    may_replace: Callable[[Path], bool],
    *,
    required: str,
    otherwise: str,
    error: type[DynamicLoraError],
) -> None:
    """Check that a file can come to lie at the path that `--output` names.

    Args:
        path: The place.
        may_replace: Whether the file that lies there may go.
        required: What must be there instead, for the message.
        otherwise: What that file is and what to do next, for the message.
        error: What to raise.

    Raises:
        DynamicLoraError: `error`, if a folder or a device is there, or a file that must stay.
    """
    if path.is_dir():
        raise error(f"`--output` must be a file, got {path}, which is a folder: give a file in it.")
    if path.exists() and not path.is_file():
        raise error(
            f"`--output` must be a file, got {path}, which is a device or a pipe: give another."
        )
    if path.exists() and not may_replace(path):
        raise error(f"`--output` must be {required}, got {path}, {otherwise}")
