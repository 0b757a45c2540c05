"""`dynlora export` for ONNX Runtime: the logits of stock PEFT are the oracle."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dynlora.cli.main import main
from tests.adapters import ALL, PATTERNS, randomised, save_classifier_adapter
from tests.jobs import missing
from tests.models import bare_llama


@torch.no_grad()
def test_onnx_runtime_computes_pefts_logits_for_any_batch_and_length(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    given = save_classifier_adapter(tmp_path / "adapter", model, labels=5)
    made = tmp_path / "made"
    adapter = str(tmp_path / "adapter")
    assert main(["export", adapter, "--format", "onnx", "--output", str(made)]) == 0
    assert {"config.json", "tokenizer_config.json"} <= {path.name for path in made.iterdir()}
    session = runtime.InferenceSession(made / "model.onnx")
    for batch, length in ((1, 2), (4, 9)):
        tokens = torch.randint(4, 15, (batch, length))
        mask = torch.ones_like(tokens)
        mask[0, length // 2 :] = 0
        inputs = {"input_ids": tokens, "attention_mask": mask}
        (logits,) = session.run(["logits"], {key: value.numpy() for key, value in inputs.items()})
        expected = given(**inputs).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_onnx_runtime_switches_an_adapter_of_unequal_ranks_on_and_off(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    bare_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = torch.randint(0, 11, (2, 7))
    plain = base.eval()(tokens).logits.numpy()
    config = LoraConfig(task_type="CAUSAL_LM", use_rslora=True, **ALL, **PATTERNS)
    given = randomised(get_peft_model(base, config))
    given.save_pretrained(tmp_path / "given")
    adapter, made = str(tmp_path / "given"), tmp_path / "made"
    assert main(["export", adapter, "--format", "onnx-lora", "--output", str(made)]) == 0
    quiet = runtime.SessionOptions()
    quiet.log_severity_level = 3
    session = runtime.InferenceSession(made / "model.onnx", quiet)
    switched, options = runtime.LoraAdapter(), runtime.RunOptions()
    switched.Load(str(made / "adapter.onnx_adapter"))
    options.add_active_adapter(switched)
    inputs = {"input_ids": tokens.numpy(), "attention_mask": np.ones_like(tokens)}
    adapted = given(tokens).logits.numpy()
    for expected, run in ((plain, None), (adapted, options), (plain, None)):
        (logits,) = session.run(["logits"], inputs, run)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    assert np.abs(adapted - plain).max() > 1e-2


def test_a_missing_package_of_the_exporter_is_named(adapter, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("dynlora.adapter_files.onnx.PACKAGES", ("no_such_package",))
    error = refused("export", adapter, "--format", "onnx", "--output", tmp_path / "made")
    assert missing(error, "no_such_package | pip install 'dynlora[onnx]'") == []
