"""Images: every kind of pixel becomes upright RGB, and what does not decode is named."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dynlora.errors import DataError
from dynlora.train.data.images import check_images, read_rgb, to_rgb
from dynlora.train.data.splits import RawSplit
from tests.pictures import encoded, picture


def split(images: Any, folder: Path = Path()) -> RawSplit:
    table = pa.table({"image": images})
    rows = range(10, 10 + table.num_rows)
    return RawSplit(name="training", source="here", table=table, rows=rows, folder=folder)


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> Any:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def reopened(image: Image.Image, kind: str = "PNG", **save: Any) -> Image.Image:
    """Return an image as a file of it is opened."""
    file = io.BytesIO()
    image.save(file, kind, **save)
    return Image.open(io.BytesIO(file.getvalue()))


def test_grey_becomes_the_same_in_each_channel() -> None:
    assert pixel(to_rgb(reopened(Image.new("L", (2, 2), 77)))) == (77, 77, 77)
    assert pixel(to_rgb(reopened(Image.new("1", (2, 2), 1)))) == (255, 255, 255)


@pytest.mark.parametrize("level", [0, 255, 256, 40_000, 65_535])
def test_sixteen_bits_keep_their_brightness(level: int) -> None:
    image = reopened(Image.fromarray(np.full((2, 2), level, dtype=np.uint16)))
    assert image.mode == "I;16"
    assert pixel(to_rgb(image)) == (level // 256,) * 3


def test_a_palette_is_resolved() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(to_rgb(reopened(image))) == (10, 20, 30)


def test_what_is_transparent_becomes_white_whatever_colour_hides_there() -> None:
    image = Image.new("RGBA", (3, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    found = to_rgb(reopened(image))
    assert pixel(found) == (10, 20, 30)
    assert pixel(found, 1) == (255, 255, 255)
    assert pixel(found, 2) == pytest.approx((204, 204, 204), abs=1)
    assert pixel(to_rgb(reopened(Image.new("LA", (1, 1), (9, 0))))) == (255, 255, 255)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(to_rgb(reopened(palette, transparency=1))) == (255, 255, 255)


def test_other_colour_spaces_become_rgb() -> None:
    assert pixel(to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="32 bits each: save it with 8 or 16"):
        to_rgb(reopened(Image.new(mode, (1, 1)), "TIFF"))


def test_a_camera_held_sideways_is_turned_upright() -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    found = read_rgb(file_of(image, exif=exif), Path())
    assert found.size == (2, 4)
    assert pixel(found, 1, 0) == (255, 0, 0), "its upper left corner is now the upper right"


def file_of(image: Image.Image, **save: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **save)
    return file.getvalue()


def test_an_image_is_found_as_bytes_as_path_and_as_either_of_both(tmp_path: Path) -> None:
    content = encoded(picture(1, 0))
    (tmp_path / "a.png").write_bytes(content)
    expected = np.asarray(picture(1, 0))
    for value in (
        content,
        "a.png",
        str(tmp_path / "a.png"),
        {"bytes": content, "path": None},
        {"bytes": content, "path": "gone.png"},
        {"bytes": None, "path": "a.png"},
    ):
        assert np.array_equal(np.asarray(read_rgb(value, tmp_path)), expected)


def test_rows_without_an_image_are_named() -> None:
    content = encoded(picture(0, 0))
    struct = [{"bytes": content, "path": None}, {"bytes": None, "path": None}]
    for images in ([content, None], [content, b""], ["a.png", ""][1:] * 2, struct):
        with pytest.raises(DataError, match=r"hold an image in every row: .* of 2 rows .*row 11"):
            check_images(split(images), "image")
    with pytest.raises(DataError, match=r"2 of 2 rows .*: 1 in row 10, 2 in row 11\."):
        check_images(split([1, 2]), "image")


def test_images_that_do_not_decode_are_counted_and_the_first_reason_is_given() -> None:
    content = encoded(picture(0, 0), "JPEG")
    broken = content[: len(content) // 2]
    images = [content, b"not an image", broken, content, *[b"no"] * 5]
    with pytest.raises(DataError, match=r"but 7 of 9 of the training split \(here, ") as error:
        check_images(split(images), "image")
    assert "rows 11, 12, 14, 15, 16, .... The first because of Unidentified" in str(error.value)
    with pytest.raises(DataError, match=r"1 of 1 .*: rows 10\. The first because of OSError: "):
        check_images(split([broken]), "image")
    check_images(split([content] * 3), "image")


def test_a_file_that_is_missing_is_told_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0, 0)))
    with pytest.raises(DataError, match=r"rows 11\. .*FileNotFoundError: .*gone\.png"):
        check_images(split(["a.png", "gone.png"], tmp_path), "image")


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"DecompressionBombError: .*240 pixels"):
        check_images(split([encoded(picture(0, 0))]), "image")
