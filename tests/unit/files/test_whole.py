"""Files and folders that are whole or absent, whoever else writes at the same time."""

import os
from pathlib import Path

import pytest

from dynlora.errors import ConfigError
from dynlora.files.whole import check_file, remove, whole_file, whole_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_keeps_its_old_content_until_the_last_writer_is_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text(path, "old")
    with whole_file(path) as one:
        with whole_file(path) as other:
            one.write_text("one")
            other.write_text("other")
            assert path.read_text() == "old"
        assert path.read_text() == "other"
    assert path.read_text() == "one"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_a_failed_write_leaves_no_draft_and_the_old_content(whole, tmp_path: Path) -> None:
    def write_half() -> None:
        with whole(tmp_path / "new") as draft:
            (draft if draft.is_file() else draft / "half").write_text("half")
            raise KeyError("stop")

    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyError, match="stop"):
        write_half()
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    name = "x" * os.pathconf(tmp_path, "PC_NAME_MAX")
    write_text(tmp_path / name, "all")
    assert names(tmp_path) == [name]


def test_a_folder_appears_whole_with_the_permissions_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    made = tmp_path / "deep" / "made"
    made.mkdir(parents=True)  # an empty folder may be replaced
    with whole_folder(made) as draft:
        (draft / "private").touch(mode=0o600)
        assert not list(made.iterdir())
    assert (made / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode
    with pytest.raises(OSError, match="not empty"), whole_folder(made) as draft:
        (draft / "file").touch()
    assert (names(made.parent), names(made)) == (["made"], ["private"])


def test_of_a_link_the_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        (tmp_path / f"to {name}").symlink_to(tmp_path / name)
    write_text(tmp_path / "to file", "new")
    with whole_folder(tmp_path / "to folder") as draft:
        (draft / "inside").touch()
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "folder" / "inside").is_file()
    assert all((tmp_path / f"to {name}").is_symlink() for name in ("file", "folder"))


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "nowhere"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]
    remove(tmp_path / "kept")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("place", "told"), [(".", "is a folder"), ("/dev/null", "is a device")])
def test_only_a_file_can_be_an_output(place: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"`--output` must be a file, got {place}, which {told}"):
        check_file(Path(place), ConfigError)
