"""Files and folders that are whole or absent, whoever else writes at the same time."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlora.errors import ConfigError
from dynlora.files.manifest import damage, manifest_of
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


def test_of_two_writers_the_last_to_finish_wins(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file") as one, whole_file(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"
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
    assert names(made.parent) == ["made"]
    with pytest.raises(OSError, match="not empty"), whole_folder(made) as draft:
        (draft / "file").touch()
    assert names(made.parent) == ["made"]
    assert names(made) == ["private"]


def check(path: Path, *, replace: bool) -> None:
    check_replaceable(
        path,
        lambda _: replace,
        required="a new file",
        otherwise="one that is mine.",
        error=ConfigError,
    )


def test_only_a_file_that_may_be_replaced_is_replaced(tmp_path: Path) -> None:
    for place, told in ((tmp_path, "which is a folder"), (Path("/dev/null"), "is a device")):
        with pytest.raises(ConfigError, match=told):
            check(place, replace=True)
    path = tmp_path / "file"
    check(path, replace=False)
    path.touch()
    check(path, replace=True)
    told = f"must be a new file, got {path}, one that is mine."
    with pytest.raises(ConfigError, match=re.escape(told)):
        check(path, replace=False)


def test_removing_a_link_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "nowhere"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "file").exists()
    remove(tmp_path / "kept")
    assert names(tmp_path) == []


def test_an_unchanged_folder_has_no_damage_even_with_new_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"abc")
    (tmp_path / "empty").touch()
    manifest = manifest_of(tmp_path)
    assert set(manifest) == {"deep/a", "empty"}
    (tmp_path / "later").write_text("more")
    assert damage(tmp_path, manifest) is None


@given(content=st.binary(min_size=1, max_size=64), data=st.data())
def test_any_other_content_is_damage(tmp_path_factory, content, data) -> None:
    folder = tmp_path_factory.mktemp("folder")
    path = folder / "file"
    path.write_bytes(content)
    manifest = manifest_of(folder)
    other = data.draw(st.binary(max_size=64).filter(lambda found: found != content))
    path.write_bytes(other)
    assert str(path) in damage(folder, manifest)
    path.unlink()
    assert damage(folder, manifest) == f"{path} is missing"
