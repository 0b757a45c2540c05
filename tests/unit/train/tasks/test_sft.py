"""TRL's trainer in a job: honest sums, explicit terms, nothing left behind."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora.errors import NonFiniteError
from dynlora.train.config import TrainingConfig
from dynlora.train.data.language import encode_pairs, fit
from dynlora.train.tasks.sft import make_sft_trainer
from dynlora.train.trainer import argument_values, make_sampler, row_lengths
from tests.language import make_pairs


def inputs(llama, count, seed):
    rows = make_pairs(count, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = [f"{row['ask']}\n" for row in rows], [row["tell"] for row in rows]
    return fit(encode_pairs(*texts, tokenizer), 48)[0]


def adapted(llama, **lora):
    base = AutoModelForCausalLM.from_pretrained(llama)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    return get_peft_model(base, LoraConfig(r=2, **settings))


@pytest.fixture
def make(llama, tmp_path):
    """Return a function from a model, by default one with an adapter, to its trainer."""

    def trainer(model=None, penalty=None, **training):
        settings = {"bf16": False, "batch_size": 4, "epochs": 1.0, "save": "no", "eval": "no"}
        config = TrainingConfig(**settings | training)
        rows = inputs(llama, 8, 1)
        return make_sft_trainer(
            argument_values(config, "token_accuracy", tmp_path),
            AutoTokenizer.from_pretrained(llama),
            sampler=make_sampler(row_lengths(rows), config),
            penalty=penalty,
            callbacks=[],
            model=adapted(llama) if model is None else model,
            train_dataset=rows,
            eval_dataset=inputs(llama, 7, 2),
        )

    return trainer


def token_by_token(model, rows):
    """Return the metrics row by row from plain logits, without padding or TRL."""
    losses, right = [], []
    for row in rows:
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        kept = labels != -100
        losses.append(cross_entropy(logits[kept].double(), labels[kept], reduction="none"))
        right.append(logits[kept].argmax(dim=-1) == labels[kept])
    loss = float(torch.cat(losses).mean())
    accuracy = float(torch.cat(right).double().mean())
    return {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": accuracy}


def test_evaluation_is_over_tokens_and_leaves_no_trace_in_the_random_state(make, llama):
    trainer = make(eval_batch_size=3)
    expected = token_by_token(adapted(llama), trainer.eval_dataset)
    before = torch.random.get_rng_state()
    found = trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-6), name


def test_a_penalty_is_added_once_a_step_in_training_alone(make):
    training, evaluated = [], []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        trainer = make(
            penalty=lambda weight=weight: torch.tensor(weight, requires_grad=True),
            logging_steps=1, batch_size=2, gradient_accumulation=2,
        )  # fmt: skip
        trainer.train()
        evaluated.append(trainer.evaluate()["eval_loss"])
        training.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    plain, penalized = training
    assert len(plain) == 2
    assert penalized == pytest.approx([loss + 3 for loss in plain], rel=1e-4)
    assert evaluated[0] == evaluated[1]


def test_the_first_loss_is_the_mean_over_the_tokens_of_the_whole_step(make, llama):
    trainer = make(logging_steps=1, batch_size=2, gradient_accumulation=4)
    expected = token_by_token(adapted(llama), trainer.train_dataset)["loss"]
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    assert "num_tokens" not in first, "it would be wrong after a resume"


def test_a_loss_that_is_not_finite_stops_the_run(make):
    trainer = make()
    trainer.model.get_base_model().lm_head.weight.data.fill_(float("inf"))
    for run in (trainer.evaluate, trainer.train):
        with pytest.raises(NonFiniteError, match="got nan after 0 optimizer steps"):
            run()


def test_trls_head_changes_no_output_and_nothing_that_is_saved(make, llama, tmp_path):
    model = adapted(llama)
    ids = torch.tensor([[6, 9, 7]])
    before = model.eval()(input_ids=ids, labels=ids)
    trainer = make(model)
    after = model.eval()(input_ids=ids, labels=ids)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(llama)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    trained = model.eval()(input_ids=ids).logits
    assert not torch.equal(trained, before.logits)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, trained)
    assert "trl" not in (tmp_path / "adapter" / "README.md").read_text()


def test_trained_weights_keep_their_type_where_trl_would_round_them(make, llama):
    model = adapted(llama, modules_to_save=["lm_head"])
    model.is_loaded_in_4bit = True
    before = {name: copy.deepcopy(p) for name, p in model.named_parameters() if p.requires_grad}
    make(model)
    after = dict(model.named_parameters())
    for name, parameter in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], parameter)


def test_nothing_is_sent(make, monkeypatch):
    def send(*args, **kwargs):
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", send)
    monkeypatch.delenv("CI", raising=False)
    assert make()
