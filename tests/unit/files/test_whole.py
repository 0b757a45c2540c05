"""Files and folders that are whole or not there, whoever else writes at the same time."""

import os
import re
from pathlib import Path

import pytest

from dynlora.errors import ConfigError
from dynlora.files.whole import check_replaceable, remove, whole_file, whole_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_keeps_its_old_content_until_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text(path, "old")
    with whole_file(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(path.parent) == ["file"]


def test_a_file_whose_writing_failed_leaves_the_old_one_and_no_draft(tmp_path: Path) -> None:
    def write_half() -> None:
        with whole_file(tmp_path / "file") as draft:
            draft.write_text("half")
            raise KeyError("stop")

    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError, match="stop"):
        write_half()
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_two_writers_of_one_place_do_not_meet(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file") as one, whole_file(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one", "the one that ended last"
    assert names(tmp_path) == ["file"]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    name = "x" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_text(tmp_path / name, "all")
    assert names(tmp_path) == [name]


def test_a_folder_with_something_in_it_is_never_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "made" / "mine", "mine")
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "made") as draft:
        (draft / "file").touch()
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["mine"]


def check(path: Path, *, replace: bool) -> None:
    check_replaceable(
        path,
        lambda _: replace,
        required="a new file",
        otherwise="one that is mine.",
        error=ConfigError,
    )


@pytest.mark.parametrize(
    ("path", "told"), [("", "which is a folder: give a file in it"), ("/dev/null", "is a device")]
)
def test_nothing_but_a_file_is_replaced(tmp_path: Path, path: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check(tmp_path / path, replace=True)


def test_a_file_is_replaced_only_if_it_may_be(tmp_path: Path) -> None:
    path = tmp_path / "file"
    check(path, replace=False)
    path.touch()
    check(path, replace=True)
    told = f"must be a new file, got {path}, one that is mine."
    with pytest.raises(ConfigError, match=re.escape(told)):
        check(path, replace=False)


def test_what_a_link_names_stays_when_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "nowhere"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").exists()
    remove(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []
