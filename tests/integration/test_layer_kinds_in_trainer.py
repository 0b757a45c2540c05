"""`Trainer` with LoRA on each kind of layer: resume, the best model, early stopping."""

import json

import pytest
import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from dynlora import DynamicLoraCallback, DynamicLoraConfig
from tests.layer_kinds import CASES
from tests.models import WINDOW

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding.*:UserWarning")

STEPS = 20


class Examples(Dataset):
    """One large batch of a case, example by example."""

    def __init__(self, case, count):
        self.columns = next(case.batches(batch=count))

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, index):
        return {key: values[index] for key, values in self.columns.items()}


class Scored(TrainerCallback):
    """Makes the evaluation at one step the best, and keeps the weights that it was made of."""

    def __init__(self, best):
        self.best = best
        self.weights = {}

    def on_evaluate(self, args, state, control, metrics, model, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - float(self.best))
        if state.global_step == self.best:
            self.weights = lora_weights(model)


class StopAt(TrainerCallback):
    """Ends training after some steps, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def lora_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def trainer_of(case, folder, *callbacks, **arguments):
    config = DynamicLoraConfig(importance="random", hysteresis=0, shrink_tolerance=1.0, **WINDOW)
    callback = DynamicLoraCallback(config)
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "optim": "adamw_torch",
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | arguments
    args = TrainingArguments(output_dir=str(folder), **settings)
    trainer = Trainer(
        case.model(),
        args,
        train_dataset=Examples(case, 16 * STEPS),
        eval_dataset=Examples(case, 8),
        callbacks=[callback, *callbacks],
    )
    return trainer, callback


@pytest.mark.parametrize("kind", ["Conv1D", "Embedding", "NF4"])
def test_a_run_resumed_from_a_checkpoint_ends_bit_for_bit_the_same(kind, tmp_path):
    case = CASES[kind]
    whole, callback = trainer_of(case, tmp_path / "whole")
    whole.train()
    trainer_of(case, tmp_path / "cut", StopAt(8))[0].train()
    torch.manual_seed(99)
    resumed, its_callback = trainer_of(case, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert its_callback.dynamic.history == callback.dynamic.history
    assert len(set(callback.dynamic.ranks.values())) > 1
    ours, theirs = lora_weights(resumed.model), lora_weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["Conv2d", "int8"])
def test_a_run_that_stops_early_ends_with_the_best_models_weights_and_ranks(kind, tmp_path):
    scored = Scored(best=4)
    trainer, callback = trainer_of(
        CASES[kind],
        tmp_path,
        scored,
        EarlyStoppingCallback(early_stopping_patience=2),
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        greater_is_better=False,
    )
    trainer.train()
    assert trainer.state.global_step == 12
    saved = json.loads((tmp_path / "checkpoint-4" / "dynlora.json").read_text())["layers"]
    assert callback.dynamic.ranks == {name: shape["r"] for name, shape in saved.items()}
    last = {n: x.rank_after for n, x in callback.dynamic.history[-1].layers.items()}
    assert callback.dynamic.ranks != last
    weights = lora_weights(trainer.model)
    assert weights.keys() == scored.weights.keys()
    assert all(torch.equal(weights[name], scored.weights[name]) for name in weights)
