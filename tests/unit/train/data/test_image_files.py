"""Images from folders."""

import logging

import pytest
from PIL import Image

from dynlora.errors import DataError
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import name_classes, read_classes
from dynlora.train.data.image_files import class_names, read_class_folders
from dynlora.train.data.splits import load_splits
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
    (tmp_path / "bees" / ".thumbnails").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "bees" / ".thumbnails" / "001.png")
    (tmp_path / "ants" / "notes.txt").write_text("none")
    with caplog.at_level(logging.WARNING, logger="dynlora"):
        table = read_class_folders(tmp_path, CONFIG)
    assert table.to_pylist() == [
        {"image": "ants/000.jpg", "label": "ants"},
        {"image": "ants/002.jpg", "label": "ants"},
        {"image": "bees/001.jpg", "label": "bees"},
        {"image": "bees/deep/X.PNG", "label": "bees"},
    ]
    assert caplog.messages == [
        f"1 of 5 files in {tmp_path} are no images by their endings (.txt) and were left out."
    ]


def test_validation_takes_the_classes_of_training(tmp_path):
    save_class_folders(tmp_path / "train", 6, ("ants", "bees", "wasps"))
    save_class_folders(tmp_path / "validation", 2, ("wasps",))
    train, validation = name_classes(*load_splits(DataConfig(path=str(tmp_path))), "label")
    assert train.class_names == validation.class_names == ["ants", "bees", "wasps"]
    assert read_classes(train, "label", None) == [0, 0, 1, 1, 2, 2]
    assert read_classes(validation, "label", 3) == [2, 2]
    assert validation.folder == tmp_path / "validation"
