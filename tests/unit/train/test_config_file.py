"""The configuration as a run's folder keeps it."""

from pathlib import Path

import pytest
import yaml

from dynlora.runs.resume import flatten
from dynlora.train.config import DataConfig, JobConfig, LoraSettings, ModelConfig, TrainingConfig
from dynlora.train.config_file import plain_values, write_config


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


def test_what_was_said_for_one_start_alone_is_not_written(tmp_path: Path) -> None:
    config = JobConfig(
        output="out",
        overwrite=True,
        model=ModelConfig(name="m"),
        data=DataConfig(name="d"),
        training=TrainingConfig(resume="latest"),
    )
    write_config(tmp_path / "config.yaml", config)
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (values["overwrite"], values["training"]["resume"]) == (False, "none")


def test_places_are_written_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = JobConfig(
        output="out",
        model=ModelConfig(path="models/it"),
        data=DataConfig(path="data"),
        lora=LoraSettings(start_from="before/adapter"),
    )
    values = plain_values(config)
    assert values["output"] == str(tmp_path / "out")
    assert values["model"]["path"] == str(tmp_path / "models" / "it")
    assert values["data"]["path"] == str(tmp_path / "data")
    assert values["lora"]["start_from"] == str(tmp_path / "before" / "adapter")


def test_names_on_the_hub_stay_names() -> None:
    config = JobConfig(output="out", model=ModelConfig(name="a/b"), data=DataConfig(name="c/d"))
    values = plain_values(config)
    assert (values["model"]["name"], values["data"]["name"]) == ("a/b", "c/d")
    assert values["model"]["path"] is values["data"]["path"] is None


def test_nested_values_are_flattened_to_dotted_keys() -> None:
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}, "f": {}}) == {
        "a": 1, "b.c": [2], "b.d.e": None,
    }  # fmt: skip
