"""Check that a split's images decode, and convert them to RGB on demand.

A column contains encoded bytes, paths, or Hugging Face image records with both. Pixels are not
cached, because they need more memory than the encoded files.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dynlora.errors import DataError
from dynlora.train.data.columns import SHOWN, refuse_rows
from dynlora.train.data.splits import RawSplit

UNDECODABLE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""Errors of Pillow for missing, broken or far too large files and unknown formats."""
WHITE = (255, 255, 255, 255)
"""Background for transparent pixels."""


def check_images(split: RawSplit, column: str) -> None:
    """Check that every row contains an image that decodes.

    Raises:
        DataError: If a row has no image, or an image does not decode.
    """
    values = split.table[column]
    missing = [(row, value) for row, value in enumerate(map(_python, values)) if not _given(value)]
    refuse_rows(
        split,
        f"column {column!r} must hold an image in every row: its bytes as JPEG, PNG or another "
        "format, or a path",
        missing,
        "Remove these rows or fill them in.",
    )
    failed: list[tuple[int, str]] = []
    for row, value in enumerate(map(_python, values)):
        try:
            read_rgb(value, split.folder)
        except UNDECODABLE as error:
            failed.append((row, f"{type(error).__name__}: {' '.join(str(error).split())}"))
    if failed:
        shown = ", ".join(str(split.rows[row]) for row, _ in failed[:SHOWN])
        more = ", ..." if len(failed) > SHOWN else ""
        raise DataError(
            f"column {column!r} must hold images that decode, but {len(failed)} of "
            f"{split.table.num_rows} of the {split.name} split ({split.source}, rows counted from "
            f"0) do not: rows {shown}{more}. The first because of {failed[0][1]}. Remove these "
            "rows or replace their images."
        )


def _python(scalar: Any) -> Any:
    return scalar.as_py()


def _given(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_given(value.get(key)) for key in ("bytes", "path"))
    return isinstance(value, bytes | str) and len(value) > 0


def read_rgb(value: Any, folder: Path) -> Image.Image:
    """Return a row's image, upright and as RGB.

    Args:
        value: Encoded bytes, a path, or a mapping with `bytes` or `path`.
        folder: Base folder of relative paths.

    Raises:
        OSError: If the image is missing or does not decode; Pillow raises others of `UNDECODABLE`.
        ValueError: If pixels have 32 bits per channel.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value["path"]
    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else folder / value) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB on a white background.

    Raises:
        ValueError: If pixels have 32 bits per channel, because their value range is unknown.
    """
    if image.mode in ("F", "I"):
        raise ValueError("its pixels have 32 bits each: save it with 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")
