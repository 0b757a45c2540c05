"""Manifests: any change of a file is seen, and nothing else is."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from dynlora.files.manifest import damage, manifest_of


def test_a_folder_as_it_was_has_no_damage_whatever_else_came_into_it(tmp_path: Path) -> None:
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
