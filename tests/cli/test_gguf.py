"""`dynlora train` on a model in a GGUF file: trained, resumed, saved, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.cli.test_resume import assert_same_end, stop_at
from tests.gguf_files import save_gguf
from tests.jobs import write_job
from tests.language import language_job, write_two_splits
from tests.unit.train.test_gguf_file import TOKENS, llama

Train = Callable[..., int]
Error = Callable[..., str]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds nothing but a tiny Llama in a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf(folder / "tiny.gguf", llama(), TOKENS)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of rows whose letters are tokens."""
    rows = [{"text": word * 3} for word in ("abc", "cde", "fgh", "bad", "ace", "lad")] * 8
    return write_two_splits(tmp_path_factory.mktemp("letters"), rows)


@pytest.fixture
def job(tmp_path: Path, model: Path, data: Path, output: Path) -> Path:
    """Return the configuration file of a job of 12 steps."""
    values = language_job(model, data, output, "text")
    values["model"]["gguf_file"] = "tiny.gguf"
    return write_job(tmp_path / "job.yaml", values)


@pytest.mark.usefixtures("moving")
def test_an_adapter_names_the_file_and_a_stopped_run_resumes_to_the_same_bits(
    train: Train, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train("--output", whole) == 0
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model / "tiny.gguf")
    run = json.loads((whole / "run.json").read_text())
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"] - 0.1
    ids = torch.tensor([[3, 4, 5, 6]])
    base = AutoModelForCausalLM.from_pretrained(model, gguf_file="tiny.gguf").eval()
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, whole / "adapter").eval()(input_ids=ids).logits
    assert float((after - before).detach().norm()) > 0.1
    with monkeypatch.context() as patch:
        stop_at(patch, 7, SystemExit)
        with pytest.raises(SystemExit):
            train("--output", stopped)
    assert train("--output", stopped, "--training.resume", "latest") == 0
    assert_same_end(whole, stopped, "dynamic")


def test_full_training_saves_a_plain_folder(train: Train, output: Path) -> None:
    assert train("--method", "full", "--training.learning_rate", 1e-3) == 0
    assert AutoModelForCausalLM.from_pretrained(output / "model").config.model_type == "llama"
    assert "quantization_config" not in json.loads((output / "model" / "config.json").read_text())


def test_a_file_can_be_quantized_and_no_bar_of_transformers_is_shown(
    train: Train, output: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--model.quantization", "nf4") == 0
    assert "GGUF tensors" not in capsys.readouterr().err
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model / "tiny.gguf")


def test_a_wrong_file_is_refused_with_the_right_key(error: Error, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"PK\x03\x04 a zip")
    for options, told in (
        (["--model.gguf_file", "null"], ["no config.json", "`model.gguf_file: tiny.gguf`"]),
        (["--model.gguf_file", "tiny.bin"], ["`model.gguf_file`", "a .gguf file", "tiny.bin"]),
        (["--model.path", "a/tiny.gguf"], ["`model.path: a`", "`model.gguf_file: tiny.gguf`"]),
        (["--model.path", tmp_path], ["must be in the GGUF format"]),
    ):
        message = error(*options)
        for part in told:
            assert part in message
