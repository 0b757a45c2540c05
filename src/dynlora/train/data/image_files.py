"""Read image folders into tables of images and classes."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from dynlora.errors import DataError
from dynlora.train.config import DataConfig

ENDINGS = frozenset({
    ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip

logger = logging.getLogger(__name__)


def class_names(folder: Path) -> list[str]:
    """Return the names of a split's class folders, sorted as numbers if all are, else as texts."""
    names = _folders(folder)
    if len(names) < 2:
        raise DataError(
            f"a folder of images must hold one folder for each of at least 2 classes, got "
            f"{len(names)} in {folder}: put the images of each class into a folder of its own."
        )
    return names


def sort_names(names: Iterable[str]) -> list[str]:
    """Return names of classes in order: as numbers if all are, else as texts."""
    found = sorted(names)
    return sorted(found, key=int) if all(map(str.isdecimal, found)) else found


def read_class_folders(folder: Path, config: DataConfig) -> pa.Table:
    """Return the images in a split's class folders as relative paths, with their classes' names."""
    files = [path for name in _folders(folder) for path in sorted((folder / name).rglob("*"))]
    inside = _images(folder, files)
    paths = pa.array([str(path) for path in inside], pa.string())
    labels = pa.array([path.parts[0] for path in inside], pa.string())
    return pa.table({config.image: paths, config.label: labels})


def read_images(folder: Path, config: DataConfig) -> pa.Table:
    """Return the sorted relative paths of all images in a folder."""
    paths = [str(path) for path in _images(folder, sorted(folder.rglob("*")))]
    return pa.table({config.image: pa.array(paths, pa.string())})


def _images(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the relative paths of the visible images among files; warn about other files."""
    inside = [path.relative_to(folder) for path in files if path.is_file()]
    found = [path for path in inside if not any(part.startswith(".") for part in path.parts)]
    images = [path for path in found if path.suffix.lower() in ENDINGS]
    if len(images) < len(found):
        others = sorted({path.suffix for path in found} - {path.suffix for path in images})
        logger.warning(
            "%d of %d files in %s are no images by their endings (%s) and were left out.",
            len(found) - len(images), len(found), folder, ", ".join(others),
        )  # fmt: skip
    return images


def _folders(folder: Path) -> list[str]:
    found = [path.name for path in folder.iterdir() if path.is_dir()]
    return sort_names(name for name in found if not name.startswith("."))
