"""`input_adaptive.json` beside an ordinary adapter: on again after loading, or a clear refusal."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from dynlora import load_input_adaptive, save_input_adaptive
from dynlora.errors import AdapterError
from tests.models import adamw, attached, bare_bert, bare_llama, lora_llama, sequences, trained

FILE = "input_adaptive.json"
WRITTEN = {
    "complexity": "prefix", "thresholds": [1.0, 2.0, 3.0], "fractions": [0.25, 0.5, 0.75, 1.0]
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Train with input-adaptive ranks; return the model, its controller and the saved folder."""
    folder = tmp_path_factory.mktemp("saved")
    model = lora_llama(r=8)
    _, dynamic = trained(model, 30, total_steps=30, hysteresis=0, input_adaptive=True)
    model.save_pretrained(folder)
    save_input_adaptive(dynamic.input_adaptive, folder)
    return model.eval(), dynamic, folder


@torch.no_grad()
def logits(model):
    return model(input_ids=next(sequences(seed=9))).logits


def test_a_loaded_adapter_is_plain_until_it_is_switched_on_and_then_as_trained(saved):
    model, dynamic, folder = saved
    loaded = PeftModel.from_pretrained(bare_llama(), folder).eval()
    with dynamic.input_adaptive.disabled():
        off = logits(model)
    torch.testing.assert_close(logits(loaded), off, atol=1e-6, rtol=1e-6)
    adaptive = load_input_adaptive(loaded, folder)
    assert adaptive.thresholds == dynamic.input_adaptive.thresholds != ()
    written = json.loads((folder / FILE).read_text())
    assert written == WRITTEN | {"thresholds": list(adaptive.thresholds)}
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)
    assert (logits(loaded) - off).abs().max() > 1e-2
    adaptive.close()
    torch.testing.assert_close(logits(loaded), off, atol=1e-6, rtol=1e-6)


def test_what_is_switched_on_twice_is_switched_off_at_once(saved):
    _, _, folder = saved
    loaded = PeftModel.from_pretrained(bare_llama(), folder).eval()
    plain = logits(loaded)
    load_input_adaptive(loaded, folder)
    again = load_input_adaptive(loaded, folder)
    assert not torch.equal(logits(loaded), plain)
    with again.disabled():
        assert torch.equal(logits(loaded), plain)
    again.close()
    assert torch.equal(logits(loaded), plain)


@pytest.mark.parametrize("way", ["loaded", "copied"])
@pytest.mark.parametrize("input_adaptive", [False, True])
def test_further_training_begins_with_masks_of_its_own_or_none(saved, caplog, way, input_adaptive):
    model, _, folder = saved
    if way == "loaded":
        model = PeftModel.from_pretrained(bare_llama(), folder, is_trainable=True)
        load_input_adaptive(model, folder)
    else:
        model = copy.deepcopy(model)
    plain = logits(PeftModel.from_pretrained(bare_llama(), folder).eval())
    assert not torch.equal(logits(model.eval()), plain)
    attached(model, adamw(model), total_steps=30, input_adaptive=input_adaptive)
    torch.testing.assert_close(logits(model), plain, atol=1e-6, rtol=1e-6)
    assert ("off from here on" in caplog.text) != input_adaptive


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": [1.0, 2.0]}, r"3 ascending numbers, or none, got \[1.0, 2.0\]"),
        ({"thresholds": [3.0, 2.0, 1.0]}, r"ascending numbers, or none, got \[3.0, 2.0, 1.0\]"),
        ({"thresholds": "abc"}, "cannot be read .ValueError"),
        ({"thresholds": [None, 1, 2]}, "cannot be read .TypeError"),
        ({"fractions": [0.5, 1.0]}, r"must be \[0.25, 0.5, 0.75, 1.0\], .* got \[0.5, 1.0\]"),
        ({"complexity": "example"}, "complexity is that of the prefix, got 'example'"),
    ],
)
def test_values_that_it_does_not_write_are_refused_and_nothing_is_installed(
    tmp_path, change, message
):
    model = lora_llama(r=8)
    (tmp_path / FILE).write_text(json.dumps(WRITTEN | change))
    with pytest.raises(AdapterError, match=message):
        load_input_adaptive(model, tmp_path)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "{}"])
def test_a_missing_or_broken_file_is_refused_with_its_path(tmp_path, text):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(AdapterError, match=f"{tmp_path / FILE} cannot be read"):
        load_input_adaptive(lora_llama(r=8), tmp_path)


def test_no_thresholds_yet_are_loaded_as_none(tmp_path):
    config = LoraConfig(r=4, target_modules=["query"])
    model = get_peft_model(bare_bert(layers=1), config)
    dynamic = attached(model, adamw(model), total_steps=30, input_adaptive=True)
    save_input_adaptive(dynamic.input_adaptive, tmp_path)
    dynamic.close()
    adaptive = load_input_adaptive(model, tmp_path)
    assert adaptive.thresholds == ()
    assert adaptive.whole
