"""A job refuses to be one of several processes or on several GPUs, before it reads anything."""

import pytest
import torch
from rich.console import Console

from dynlora.errors import EngineError
from dynlora.train.config import DataConfig, JobConfig, ModelConfig
from dynlora.train.job import run_job


@pytest.fixture
def refused(tmp_path):
    """Return a runner of a job that must be refused with a message."""

    def run(message):
        config = JobConfig(
            output=str(tmp_path / "run"), model=ModelConfig(name="a/b"), data=DataConfig(name="c/d")
        )
        with pytest.raises(EngineError, match=message):
            run_job(config, Console())
        assert not (tmp_path / "run").exists()

    return run


def test_one_of_several_processes_is_refused_with_their_number(monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused("must run in one process, got WORLD_SIZE='4', and several would all write")


@pytest.mark.parametrize("given", ["", "two", "1.5", "-1"])
def test_a_number_of_processes_that_is_none_is_refused(given, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", given)
    refused(f"must run in one process, got WORLD_SIZE='{given}'.* unset it")


def test_several_gpus_are_refused_with_what_shows_one(monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused("must see one GPU at most, got 2, .*: set CUDA_VISIBLE_DEVICES")
