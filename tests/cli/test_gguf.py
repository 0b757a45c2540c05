"""`dynlora train` on a model in a GGUF file: trained, resumed, saved, or refused."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dynlora.cli.main import main
from tests.cli.finished import assert_same_end, facts, read_json, stopped_at
from tests.gguf_files import TOKENS, llama, save_gguf
from tests.jobs import missing, write_job
from tests.language import language_job, write_two_splits


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return a folder that holds nothing but a tiny Llama in a GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf(folder / "tiny.gguf", llama(), TOKENS)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    rows = [{"text": word * 3} for word in ("abc", "cde", "fgh", "bad", "ace", "lad")] * 8
    return write_two_splits(tmp_path_factory.mktemp("letters"), rows)


@pytest.fixture
def job(tmp_path, model, data, output):
    values = language_job(model, data, output, "text")
    values["model"]["gguf_file"] = "tiny.gguf"
    return write_job(tmp_path / "job.yaml", values)


@pytest.mark.usefixtures("moving")
def test_an_adapter_names_the_file_and_a_run_resumes_to_the_same_bits(train, output, model, capsys):
    assert train() == 0
    assert "GGUF tensors" not in capsys.readouterr().err, "a bar of transformers"
    config = read_json(output / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(model / "tiny.gguf")
    run = facts(output)
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"] - 0.1
    ids = torch.tensor([[3, 4, 5, 6]])
    base = AutoModelForCausalLM.from_pretrained(model, gguf_file="tiny.gguf").eval()
    before = base(ids).logits
    merged = output.with_name("merged")
    words = ["export", output / "adapter", "--format", "merged", "--output", merged]
    assert main([*map(str, words)]) == 0, "the adapter names the file"
    after = PeftModel.from_pretrained(base, output / "adapter").eval()(input_ids=ids).logits
    assert float((after - before).detach().norm()) > 0.1
    plain = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert torch.allclose(plain(ids).logits, after, atol=1e-5)
    whole = output.rename(output.with_name("whole"))
    with stopped_at(7), pytest.raises(SystemExit):
        train()
    assert train("--training.resume", "latest") == 0
    assert facts(output)["resumed_from_step"] == 5
    assert_same_end(whole, output)


def test_full_training_saves_a_plain_folder(train, output):
    assert train("--method", "full", "--training.max_steps", 2) == 0
    assert AutoModelForCausalLM.from_pretrained(output / "model").config.model_type == "llama"
    assert "quantization_config" not in read_json(output / "model" / "config.json")


def test_a_wrong_file_is_refused_with_the_right_key(error, tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"PK\x03\x04 a zip")
    own = "`model.gguf_file: tiny.gguf`"
    for options, told in (
        (["--model.gguf_file", "null"], "no config.json | `model.gguf_file: tiny.gguf`"),
        (["--model.gguf_file", "tiny.bin"], "`model.gguf_file` | tiny.bin | are: tiny.gguf"),
        *(
            (["--model.path", "null", f"--model.{key}", "a/tiny.gguf"], f"`model.{key}: a` | {own}")
            for key in ("path", "name", "package")
        ),
        (["--model.path", tmp_path], "must be a whole GGUF file"),
    ):
        assert missing(error(*options), told) == []
