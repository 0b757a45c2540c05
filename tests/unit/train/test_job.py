"""A job refuses to be one of several processes, before it reads or writes anything."""

import pytest
from rich.console import Console

from dynlora.errors import EngineError
from dynlora.train.config import DataConfig, JobConfig, ModelConfig
from dynlora.train.job import run_job


def test_one_of_several_processes_is_refused_with_their_number(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = JobConfig(
        output=str(tmp_path / "run"), model=ModelConfig(name="a/b"), data=DataConfig(name="c/d")
    )
    with pytest.raises(EngineError, match="must run in one process, got 4, which would all write"):
        run_job(config, Console())
    assert not (tmp_path / "run").exists()
