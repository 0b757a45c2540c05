"""Images and their classes to pixels, when they are asked for, and logits back to classes."""

import io
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from transformers import BitImageProcessorPil, ViTConfig

from dynlora.adapter_files.base_models import Source
from dynlora.errors import ConfigError, DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.splits import load_splits
from dynlora.train.tasks.image_classification import IMAGE_CLASSIFICATION as TASK
from dynlora.train.tasks.image_classification import check_images, read_rgb, to_rgb
from tests.jobs import split_of
from tests.pictures import SIDE, encoded, picture, picture_rows, save_class_folders, save_vit
from tests.strange_models import put_code_beside

CONFIG = DataConfig(name="d")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return TASK.load_processor(Source(place=str(save_vit(tmp_path_factory.mktemp("v")))), CONFIG)


def expected(image):
    """Return the pixels by hand: resized by Pillow, then brought from [0, 255] to [-1, 1]."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return (np.asarray(small, dtype=np.float64) / 255 - 0.5).transpose(2, 0, 1) / 0.5


def test_a_row_is_the_images_pixels_and_its_class(processor):
    rows = picture_rows(6)
    images, labels = ([row[key] for row in rows] for key in ("image", "label"))
    found = TASK.read_split(split_of(image=images, label=labels), CONFIG, processor, None)
    assert (len(found.inputs), found.cut, found.num_labels) == (6, 0, 2)
    for place in range(6):
        row = found.inputs[place]
        assert row["labels"] == place % 2
        assert np.allclose(row["pixel_values"], expected(picture(place % 2, place)), atol=1e-6)
    batch = found.inputs[2:4]
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert found.inputs["labels"][:] == [0, 1] * 3


def test_pixels_are_made_when_they_are_asked_for(tmp_path, processor):
    for split in ("train", "validation"):
        save_class_folders(tmp_path / split, 4)
    train, _ = load_splits(DataConfig(path=str(tmp_path)))
    inputs = TASK.read_split(train, CONFIG, processor, None).inputs
    Image.new("RGB", (5, 5), (255, 255, 255)).save(tmp_path / "train" / "ants" / "000.jpg")
    assert float(inputs[0]["pixel_values"].min()) == 1, "as the file is now"


def test_a_file_that_was_written_by_datasets_is_read_too(tmp_path, processor):
    rows = [{"image": picture(n % 2, n), "label": n % 2} for n in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    data = datasets.Dataset.from_list(rows, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    data.to_parquet(tmp_path / "validation.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "train.parquet")
    assert b"Image" in schema.metadata[b"huggingface"]
    train, _ = load_splits(DataConfig(path=str(tmp_path)))
    inputs = TASK.read_split(train, CONFIG, processor, None).inputs
    assert np.allclose(inputs[3]["pixel_values"], expected(picture(1, 3)), atol=1e-6)


def test_a_processor_that_keeps_images_of_different_shapes_is_refused(tmp_path):
    ViTConfig().save_pretrained(tmp_path)
    BitImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"shape \(3, 24, 32\) and \(3, 32, 24\): set `do_center"):
        TASK.load_processor(Source(place=str(tmp_path)), CONFIG)


def test_a_model_in_half_precision_reads_the_processors_pixels(tmp_path):
    source = Source(place=str(save_vit(tmp_path)), dtype="bfloat16")
    assert TASK.load_model(source, 2, TASK.load_processor(source, CONFIG))


def test_code_beside_a_processor_never_runs(tmp_path, monkeypatch):
    save_vit(tmp_path / "m")
    put_code_beside(tmp_path / "m", tmp_path / "ran")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ConfigError, match=f"image processor of {tmp_path / 'm'} could not be load"):
        TASK.load_processor(Source(place=str(tmp_path / "m")), CONFIG)
    assert not (tmp_path / "ran").exists()


def check(images, folder=Path()):
    check_images(replace(split_of(image=images), folder=folder), "image")


def reopened(image, kind="PNG", **save):
    """Return an image as a file of it is opened."""
    file = io.BytesIO()
    image.save(file, kind, **save)
    return Image.open(io.BytesIO(file.getvalue()))


def coloured():
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "save", "colour"),
    [
        (Image.new("L", (2, 2), 77), {}, (77, 77, 77)),
        (Image.new("1", (2, 2), 1), {}, (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 256, dtype=np.uint16)), {}, (1, 1, 1)),
        (Image.fromarray(np.full((2, 2), 40_000, dtype=np.uint16)), {}, (156, 156, 156)),
        (coloured(), {}, (10, 20, 30)),
        # Transparent pixels become white, in any colour.
        (Image.new("RGBA", (1, 1), (10, 20, 30, 255)), {}, (10, 20, 30)),
        (Image.new("RGBA", (1, 1), (200, 0, 0, 0)), {}, (255, 255, 255)),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 51)), {}, pytest.approx((204, 204, 204), abs=1)),
        (Image.new("LA", (1, 1), (9, 0)), {}, (255, 255, 255)),
        (coloured(), {"transparency": 1}, (255, 255, 255)),
    ],
)
def test_images_of_any_mode_become_rgb_on_white(image, save, colour):
    assert (rgb := to_rgb(reopened(image, **save))).mode == "RGB"
    assert rgb.getpixel((0, 0)) == colour


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
    with pytest.raises(ValueError, match="32 bits each: save it with 8 or 16"):
        to_rgb(reopened(Image.new(mode, (1, 1)), "TIFF"))


def test_a_camera_held_sideways_is_turned_upright():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    found = read_rgb(file.getvalue(), Path())
    assert found.size == (2, 4)
    assert found.getpixel((1, 0)) == (255, 0, 0), "its upper left corner is now the upper right"


def test_an_image_is_found_as_bytes_as_path_and_as_either_of_both(tmp_path):
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


def test_rows_without_an_image_or_with_a_broken_one_are_counted_with_reasons(monkeypatch):
    content, jpeg = encoded(picture(0, 0)), encoded(picture(0, 0), "JPEG")
    broken = jpeg[: len(jpeg) // 2]
    struct = [{"bytes": content, "path": None}, {"bytes": None, "path": None}]
    for images in ([content, None], [content, b""], ["a.png", ""][1:] * 2, struct):
        with pytest.raises(DataError, match=r"hold an image in every row: .* of 2 rows .*row 1"):
            check(images)
    with pytest.raises(DataError, match=r"`data\.image` names the column 'picture'"):
        check_images(split_of(image=[content]), "picture")
    with pytest.raises(DataError, match=r"2 of 2 rows .*: 1 in row 0, 2 in row 1\."):
        check([1, 2])
    with pytest.raises(DataError, match=r"1 of 1 rows .*: \{'bytes': 5, 'path': .* in row 0"):
        check([{"bytes": 5, "path": "a.png"}])
    told = r"but 7 of 9 rows .*: UnidentifiedImageError: .* row 1, OSError: .* row 2, .* row 6"
    with pytest.raises(DataError, match=told):
        check([jpeg, b"not an image", broken, jpeg, *[b"no"] * 5])
    with pytest.raises(DataError, match=r"1 of 1 .*: FileNotFoundError: .*gone\.png' in row 0"):
        check(["gone.png"], Path("/nowhere"))
    check([jpeg] * 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"DecompressionBombError: .*240 pixels"):
        check([content])
