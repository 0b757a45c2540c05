"""Read image folders and NumPy archives into tables of images and classes."""

import io
import logging
import zipfile
import zlib
from collections.abc import Sequence
from lzma import LZMAError
from pathlib import Path
from tokenize import TokenError

import numpy as np
import pyarrow as pa
from PIL import Image

from dynlora.errors import DataError
from dynlora.train.config import DataConfig

ENDINGS = frozenset({
    ".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
IMAGE_NAMES = ("images", "image", "x", "X", "data", "arr_0")
"""Names to try for the image array in .npz files, after `data.image`."""
LABEL_NAMES = ("labels", "label", "y", "Y", "targets", "target", "arr_1")
"""Names to try for the class array in .npz files, after `data.label`."""
UNREADABLE = (
    OSError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, TokenError,
    zipfile.BadZipFile, zlib.error, LZMAError, pa.ArrowException,
)  # fmt: skip
"""Errors of NumPy and `zipfile` for broken files or arrays too large for memory, and of pyarrow
for unsupported number types."""
CHANNELS = (1, 3, 4)

logger = logging.getLogger(__name__)


def class_names(folder: Path) -> list[str]:
    """Return the names of a split's class folders, sorted as numbers if all are, else as texts."""
    names = _folders(folder)
    if len(names) < 2:
        raise DataError(
            f"a folder of images must hold one folder for each of at least 2 classes, got "
            f"{len(names)} in {folder}: put the images of each class into a folder of its own."
        )
    return sorted(names, key=int) if all(map(str.isdecimal, names)) else names


def read_class_folders(folder: Path, classes: Sequence[str], config: DataConfig) -> pa.Table:
    """Return the images in a split's class folders as relative paths, with their classes."""
    unknown = [name for name in _folders(folder) if name not in classes]
    if unknown:
        raise DataError(
            f"the folders in {folder} must be classes of the training split, {', '.join(classes)}, "
            f"got also {', '.join(unknown)}: give the training split such images, or remove them."
        )
    files = [path for name in classes for path in sorted((folder / name).rglob("*"))]
    inside = _images(folder, files)
    labels = [classes.index(path.parts[0]) for path in inside]
    paths = pa.array([str(path) for path in inside], pa.string())
    return pa.table({config.image: paths, config.label: pa.array(labels, pa.int64())})


def read_images(folder: Path, config: DataConfig) -> pa.Table:
    """Return the sorted relative paths of all images in a folder, except of hidden ones."""
    inside = _images(folder, sorted(folder.rglob("*")))
    shown = [str(path) for path in inside if all(not part.startswith(".") for part in path.parts)]
    return pa.table({config.image: pa.array(shown, pa.string())})


def _images(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the relative paths of the images among files, and warn about other files."""
    found = [path for path in files if _visible(path) and path.is_file()]
    images = [path for path in found if path.suffix.lower() in ENDINGS]
    if len(images) < len(found):
        others = sorted({path.suffix for path in found} - {path.suffix for path in images})
        logger.warning(
            "%d of %d files in %s are no images by their endings (%s) and were left out.",
            len(found) - len(images), len(found), folder, ", ".join(others),
        )  # fmt: skip
    return [path.relative_to(folder) for path in images]


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if _visible(path) and path.is_dir())


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def read_npz(path: Path, config: DataConfig, *, labelled: bool = True) -> pa.Table:
    """Return the images in a .npz file as PNG, with their classes, under the names in `config`.

    Classes may be missing unless `labelled`.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = _pick(path, arrays, "data.image", (config.image, *IMAGE_NAMES))
            encoded = [_png(picture) for picture in _channels_last(path, images)]
            columns = {config.image: pa.array(encoded, pa.large_binary())}
            if labelled or not {config.label, *LABEL_NAMES}.isdisjoint(arrays.files):
                columns[config.label] = pa.array(_classes(path, arrays, config, len(images)))
            return pa.table(columns)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} must be a readable file of NumPy arrays: {reason}") from error


def _classes(
    path: Path, arrays: "np.lib.npyio.NpzFile", config: DataConfig, images: int
) -> np.ndarray:
    labels = _pick(path, arrays, "data.label", (config.label, *LABEL_NAMES))
    labels = labels.reshape(-1) if labels.shape[1:] == (1,) else labels
    if labels.shape != (images,):
        raise DataError(
            f"{path} must hold one class for each image, got classes of shape {labels.shape} for "
            f"{images} images."
        )
    return labels


def _pick(path: Path, arrays: "np.lib.npyio.NpzFile", key: str, names: Sequence[str]) -> np.ndarray:
    found = [name for name in names if name in arrays.files]
    if not found:
        raise DataError(
            f"{path} must hold an array called {', '.join(dict.fromkeys(names))}, got "
            f"{', '.join(arrays.files) or 'none'}: set `{key}` to the name of the right one."
        )
    return np.asarray(arrays[found[0]])


def _channels_last(path: Path, images: np.ndarray) -> np.ndarray:
    """Return images of shape ``(n, height, width)`` or ``(n, height, width, channels)``."""
    if images.dtype not in (np.uint8, np.uint16) or images.ndim not in (3, 4):
        raise DataError(
            f"images in {path} must be whole numbers of 8 or 16 bits (uint8, uint16), of shape "
            f"(n, height, width) or that with channels, got {images.dtype} of shape {images.shape}."
        )
    if images.ndim == 3:
        return images
    if images.shape[3] not in CHANNELS and images.shape[1] in CHANNELS:
        images = images.transpose(0, 2, 3, 1)
    if images.shape[3] not in CHANNELS or (images.dtype == np.uint16 and images.shape[3] > 1):
        raise DataError(
            f"images in {path} must have 1 channel, or 3 or 4 of 8 bits, got {images.dtype} of "
            f"shape {images.shape}."
        )
    return images[..., 0] if images.shape[3] == 1 else images


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    # Compress fast: the images are decoded again soon.
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG", compress_level=1)
    return file.getvalue()
