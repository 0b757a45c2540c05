"""A folder that appears whole or not at all."""

import pytest

from dynlora.adapter_files.folder import new_folder
from dynlora.errors import AdapterError


def test_nothing_is_left_of_a_folder_whose_writing_failed(tmp_path):
    def write_half() -> None:
        with new_folder(tmp_path / "made") as draft:
            (draft / "half").write_text("half")
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_not_there_until_all_is_written(tmp_path):
    with new_folder(tmp_path / "deep" / "made") as draft:
        (draft / "file").write_text("all")
        assert not (tmp_path / "deep" / "made").exists()
    assert (tmp_path / "deep" / "made" / "file").read_text() == "all"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["made"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "made").mkdir()
    with new_folder(tmp_path / "made") as draft:
        (draft / "file").write_text("all")
    assert (tmp_path / "made" / "file").is_file()


def test_others_may_read_what_they_could_read_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    with new_folder(tmp_path / "made") as draft:
        (draft / "private").touch(mode=0o600)
    given = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "made" / "private").stat().st_mode == given


def test_a_disk_that_refuses_is_an_error_of_the_user(tmp_path):
    def fill() -> None:
        with new_folder(tmp_path / "made"):
            raise OSError(28, "the disk is full")

    with pytest.raises(AdapterError, match=r"made could not be written: .*full"):
        fill()
    assert list(tmp_path.iterdir()) == []
