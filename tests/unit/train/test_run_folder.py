"""A run's folder: what it may replace, and files that are whole or not there."""

from pathlib import Path

import pytest
import yaml

from dynlora.errors import RunFolderError
from dynlora.train.config import DataConfig, JobConfig, LoraSettings, ModelConfig
from dynlora.train.run_folder import (
    RunFolder,
    append_line,
    read_lines,
    write_config,
    write_json,
    write_lines,
    write_text,
)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "deep" / "run")


def begin(folder: RunFolder) -> None:
    for path in (folder.adapter, folder.full_model, folder.checkpoints):
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    for path in (folder.config, folder.run, folder.metrics, folder.ranks, folder.heatmap):
        path.write_text("x")


def test_clearing_removes_a_run_and_nothing_else(folder: RunFolder) -> None:
    begin(folder)
    (folder.root / "notes").mkdir()
    (folder.root / "notes" / "mine.txt").write_text("mine")
    folder.clear()
    assert [path.name for path in folder.root.iterdir()] == ["notes"]
    folder.clear()


def test_a_new_or_empty_folder_and_one_with_a_run_are_usable(folder: RunFolder) -> None:
    folder.check_usable()
    folder.root.mkdir(parents=True)
    folder.check_usable()
    begin(folder)
    folder.check_usable()
    with pytest.raises(RunFolderError, match=f"{folder.root}, which holds one"):
        folder.refuse_run()


@pytest.mark.parametrize("name", ["adapter", "model", "checkpoints", "config.yaml", "ranks.png"])
def test_names_that_a_run_would_write_are_refused_where_no_run_wrote_them(
    folder: RunFolder, name: str
) -> None:
    (folder.root / name).mkdir(parents=True)
    with pytest.raises(RunFolderError, match=f"write {name}, got .* no run.json"):
        folder.check_usable()


def test_a_file_in_the_way_is_named(folder: RunFolder) -> None:
    folder.root.parent.write_text("a file")
    with pytest.raises(RunFolderError, match=f"{folder.root.parent} is a file"):
        folder.check_usable()


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    write_text(path, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["values.json"]


def test_lines_come_back_and_one_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    write_lines(path, [])
    assert read_lines(path) == []
    write_lines(path, [{"step": 1}])
    append_line(path, {"step": 2, "text": "a\nb \u2028 c"})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1}, {"step": 2, "text": "a\nb \u2028 c"}]


def test_the_written_configuration_is_plain_yaml(tmp_path: Path) -> None:
    config = JobConfig(
        output="out",
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        lora=LoraSettings(target_modules=("query", "value")),
    )
    write_config(tmp_path / "config.yaml", config)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values["lora"]["target_modules"] == ["query", "value"]
    assert values["dynamic"]["pinned"] == []
    assert list(values)[:4] == ["output", "overwrite", "task", "method"], (
        "in the order of the classes"
    )
