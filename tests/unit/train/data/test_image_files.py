"""Images from folders and arrays."""

import io
import logging
import zipfile

import numpy as np
import pytest
from PIL import Image

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.image_files import class_names, read_class_folders, read_npz
from dynlora.train.data.splits import load_splits
from dynlora.train.tasks.image_classification import read_rgb
from tests.pictures import save_class_folders

CONFIG = DataConfig(name="d")


def test_classes_stand_in_the_order_of_their_names_or_numbers(tmp_path):
    for path in ("words/bees", "words/ants", "words/.cache", "n/10", "n/9", "n/0", "one/ants"):
        (tmp_path / path).mkdir(parents=True)
    assert class_names(tmp_path / "words") == ["ants", "bees"]
    assert class_names(tmp_path / "n") == ["0", "9", "10"]
    with pytest.raises(DataError, match=r"at least 2 classes, got 1 in .*one: put the images"):
        class_names(tmp_path / "one")


def test_each_image_of_a_class_folder_has_its_class_and_its_path(tmp_path, caplog):
    save_class_folders(tmp_path, 3)
    (tmp_path / "bees" / "deep").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "bees" / "deep" / "X.PNG")
    (tmp_path / "bees" / ".DS_Store").write_text("")
    (tmp_path / "ants" / "notes.txt").write_text("none")
    with caplog.at_level(logging.WARNING, logger="dynlora"):
        table = read_class_folders(tmp_path, ["ants", "bees"], CONFIG)
    assert table.to_pylist() == [
        {"image": "ants/000.jpg", "label": 0},
        {"image": "ants/002.jpg", "label": 0},
        {"image": "bees/001.jpg", "label": 1},
        {"image": "bees/deep/X.PNG", "label": 1},
    ]
    assert caplog.messages == [
        f"1 of 5 files in {tmp_path} are no images by their endings (.txt) and were left out."
    ]


def test_validation_takes_the_classes_of_training(tmp_path):
    save_class_folders(tmp_path / "train", 6, ("ants", "bees", "wasps"))
    save_class_folders(tmp_path / "validation", 2, ("wasps",))
    train, validation = load_splits(DataConfig(path=str(tmp_path)))
    assert train.table["label"].to_pylist() == [0, 0, 1, 1, 2, 2]
    assert validation.table["label"].to_pylist() == [2, 2]
    assert validation.folder == tmp_path / "validation"


def save(folder, **arrays):
    path = folder / "all.npz"
    np.savez(path, **arrays)
    return path


def pixels(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image)


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 6, 7, 4), (5, 3, 6, 7)])
def test_arrays_become_the_same_pixels(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    table = read_npz(save(tmp_path, images=images, labels=np.arange(5)), CONFIG)
    assert table["label"].to_pylist() == [0, 1, 2, 3, 4]
    found = np.stack([pixels(content) for content in table["image"].to_pylist()])
    expected = images.transpose(0, 2, 3, 1) if shape[1] == 3 else images
    assert np.array_equal(found, expected[..., 0] if shape[-1] == 1 else expected)


def test_arrays_of_sixteen_bits_keep_their_brightness(tmp_path):
    images = np.full((1, 4, 4), 40_000, dtype=np.uint16)
    table = read_npz(save(tmp_path, x=images, y=np.array([[1]])), CONFIG)
    assert table["label"].to_pylist() == [1]
    image = read_rgb(table["image"][0].as_py(), tmp_path)
    assert image.getpixel((0, 0)) == (40_000 // 256,) * 3


def test_the_names_of_the_configuration_win_over_usual_ones(tmp_path):
    grey = np.zeros((2, 4, 4), np.uint8)
    path = save(tmp_path, data=grey, inverted=grey + 255, targets=[0, 1], z=[3, 4])
    assert pixels(read_npz(path, CONFIG)["image"][0].as_py()).max() == 0
    table = read_npz(path, DataConfig(name="d", image="inverted", label="z"))
    assert table["z"].to_pylist() == [3, 4]
    assert pixels(table["inverted"][0].as_py()).min() == 255


IMAGES = np.zeros((3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"pictures": IMAGES, "y": [0, 1, 2]}, r"called image, images, .* got pictures, y: set `d"),
        ({"x": IMAGES, "y": [0, 1]}, r"classes of shape \(2,\) for 3 images"),
        ({"x": IMAGES / 255, "y": [0, 1, 2]}, r"8 or 16 bits .* got float64 of shape \(3, 4, 4\)"),
        ({"x": IMAGES[0], "y": [0, 1, 2, 0]}, r"of shape \(n, height, width\) .*shape \(4, 4\)"),
        ({"x": np.zeros((3, 6, 6, 5), np.uint8), "y": [0, 1, 2]}, r"1 channel, or 3 or 4 .*6, 5\)"),
        ({"x": np.zeros((3, 4, 4, 3), np.uint16), "y": [0, 1, 2]}, r"8 bits, got uint16"),
        ({"x": np.array([None, 1]), "y": [0, 1]}, "readable file of NumPy arrays: Object arrays"),
    ],
)
def test_other_arrays_are_refused_by_name_type_or_shape(tmp_path, arrays, told):
    with pytest.raises(DataError, match=told):
        read_npz(save(tmp_path, **arrays), CONFIG)


@pytest.mark.parametrize("content", [b"PK\x03\x04 and nothing more", b""])
def test_a_file_that_holds_no_arrays_is_refused(tmp_path, content):
    (tmp_path / "all.npz").write_bytes(content)
    with pytest.raises(DataError, match="readable file of NumPy arrays"):
        load_splits(DataConfig(path=str(tmp_path / "all.npz")))


@pytest.mark.parametrize("shape", [(10**12,), (2**62, 2**62), (3, 400, 400)])
def test_arrays_that_say_they_are_larger_than_their_file_are_refused(tmp_path, shape):
    said = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(tmp_path / "all.npz", "w") as archive, archive.open("x.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, said)
        file.write(bytes(48))
    with pytest.raises(DataError, match=r"all\.npz must be a readable file of NumPy arrays"):
        read_npz(tmp_path / "all.npz", CONFIG)
