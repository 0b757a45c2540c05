"""A run's folder: what it may replace, and one writer at a time."""

from pathlib import Path

import pytest

from dynlora.errors import RunFolderError
from dynlora.runs.folder import RunFolder

KEPT = ["config.yaml", "notes", "run.json"]
"""After clearing a run: the files that the next run overwrites, and the user's own."""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "deep" / "run")


def begin(folder: RunFolder) -> None:
    for path in (folder.adapter, folder.full_model, folder.checkpoints):
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    for path in (folder.config, folder.run, folder.metrics, folder.ranks, folder.heatmap):
        path.write_text("x")


def test_a_usable_folder_is_new_empty_or_a_runs_which_is_cleared_and_nothing_else(
    folder: RunFolder,
) -> None:
    folder.check_usable()
    folder.root.mkdir(parents=True)
    folder.check_usable()
    begin(folder)
    (folder.root / "notes").mkdir()
    (folder.root / "notes" / "mine.txt").write_text("mine")
    (folder.root / ".dynlora-0123").write_text("of a process that was killed while it wrote")
    for _ in range(2):
        folder.check_usable()
        folder.clear()
        assert sorted(path.name for path in folder.root.iterdir()) == KEPT


@pytest.mark.parametrize("name", ["adapter", "model", "checkpoints/checkpoint-5/adapter"])
def test_what_a_job_reads_must_not_lie_where_a_run_is_replaced(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "run")
    place = str(tmp_path / "run" / name)
    with pytest.raises(RunFolderError, match=r"`lora.start_from` must lie outside"):
        folder.check_apart({"model.path": None, "lora.start_from": place})
    folder.check_apart({"model.path": str(tmp_path / "run-2" / name)})
    folder.check_apart({"data.path": str(tmp_path / "run" / "notes.csv")})


def test_a_folder_has_one_writer_whatever_lock_a_killed_run_has_left(folder: RunFolder) -> None:
    folder.root.mkdir(parents=True)
    (folder.root / "run.lock").touch()
    folder.check_usable()
    told = f"no other run writes to, got {folder.root}"
    with folder.held():
        begin(folder)
        with pytest.raises(RunFolderError, match=told), RunFolder(folder.root).held():
            pass
        with pytest.raises(RunFolderError, match=told):
            RunFolder(folder.root).check_usable()
    folder.check_usable()
    with folder.held():
        pass
    assert not (folder.root / "run.lock").exists()


def test_a_lock_that_cannot_be_tried_counts_as_taken(folder: RunFolder) -> None:
    (folder.root / "run.lock").mkdir(parents=True)  # as without the right to write to it
    assert folder.is_in_use()


def test_a_folder_that_cannot_be_made_is_told(folder: RunFolder) -> None:
    folder.root.parent.write_text("a file")
    with pytest.raises(RunFolderError, match="can be written, got"), folder.held():
        pass
