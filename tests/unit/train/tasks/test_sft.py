"""TRL's trainer in a job: honest sums, explicit terms, nothing left behind."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from dynlora.errors import ConfigError, NonFiniteError
from dynlora.train.config import TrainingConfig
from dynlora.train.data.language import encode_pairs, fit
from dynlora.train.tasks.sft import make_sft_trainer
from dynlora.train.trainer import argument_values, make_sampler, row_lengths
from tests.language import make_pairs, save_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("model"))


def inputs(folder, count, seed):
    rows = make_pairs(count, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [f"{row['ask']}\n" for row in rows], [row["tell"] for row in rows]
    return fit(encode_pairs(*texts, tokenizer, "training"), 48)[0]


def adapted(folder, **lora):
    base = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
    return get_peft_model(base, LoraConfig(r=2, **settings))


def make(folder, output, model=None, **given):
    training = {"bf16": False, "batch_size": 4, "epochs": 1.0, "save": "no", "eval": "no"}
    config = TrainingConfig(**training | given.pop("training", {}))
    rows = inputs(folder, 8, 1)
    return make_sft_trainer(
        argument_values(config, "token_accuracy", output),
        AutoTokenizer.from_pretrained(folder),
        sampler=make_sampler(row_lengths(rows), config),
        penalty=given.pop("penalty", None),
        callbacks=list(given.pop("callbacks", ())),
        model=adapted(folder) if model is None else model,
        train_dataset=rows,
        eval_dataset=inputs(folder, 7, 2),
    )


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


def test_evaluation_is_over_tokens_and_leaves_no_trace_in_the_random_state(folder, tmp_path):
    trainer = make(folder, tmp_path, training={"eval_batch_size": 3})
    expected = token_by_token(adapted(folder), trainer.eval_dataset)
    before = torch.random.get_rng_state()
    found = trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-6), name


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values.append(dict(logs))


def test_a_penalty_is_added_once_a_step_in_training_alone(folder, tmp_path):
    logged = {}
    for weight in (0.0, 3.0):
        logged[weight] = Losses()
        torch.manual_seed(0)
        trainer = make(
            folder,
            tmp_path,
            penalty=lambda weight=weight: torch.tensor(weight, requires_grad=True),
            callbacks=(logged[weight],),
            training={"logging_steps": 1, "batch_size": 2, "gradient_accumulation": 2},
        )
        trainer.train()
        trainer.evaluate()
    plain, penalized = ([line["loss"] for line in log.values if "loss" in line]
                        for log in logged.values())  # fmt: skip
    assert len(plain) == 2
    assert penalized == pytest.approx([loss + 3 for loss in plain], rel=1e-4)
    evaluated = [log.values[-1]["eval_loss"] for log in logged.values()]
    assert evaluated[0] == evaluated[1]


def test_the_first_loss_is_the_mean_over_the_tokens_of_the_whole_step(folder, tmp_path):
    log = Losses()
    trainer = make(
        folder,
        tmp_path,
        callbacks=(log,),
        training={"logging_steps": 1, "batch_size": 2, "gradient_accumulation": 4},
    )
    expected = token_by_token(adapted(folder), trainer.train_dataset)["loss"]
    trainer.train()
    assert log.values[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert "num_tokens" not in log.values[0], "it would be wrong after a resume"


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    trainer = make(folder, tmp_path)
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.fill_(float("inf"))
    for run in (trainer.evaluate, trainer.train):
        with pytest.raises(NonFiniteError, match="got nan after 0 optimizer steps"):
            run()


def test_an_adapter_on_the_head_is_refused_with_the_way_out(folder, tmp_path):
    on_head = adapted(folder, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"an adapter on 'lm_head'.*modules_to_save: \[lm_head\]"):
        make(folder, tmp_path, on_head)
    assert make(folder, tmp_path, adapted(folder, modules_to_save=["lm_head"]))


def test_trls_head_changes_no_output_and_nothing_that_is_saved(folder, tmp_path):
    model = adapted(folder)
    ids = torch.tensor([[6, 9, 7]])
    before = model.eval()(input_ids=ids, labels=ids)
    trainer = make(folder, tmp_path, model)
    after = model.eval()(input_ids=ids, labels=ids)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    trainer.train()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    trained = model.eval()(input_ids=ids).logits
    assert not torch.equal(trained, before.logits)
    assert torch.equal(loaded.eval()(input_ids=ids).logits, trained)
    assert "trl" not in (tmp_path / "adapter" / "README.md").read_text()


def test_trained_weights_keep_their_type_where_trl_would_round_them(folder, tmp_path):
    model = adapted(folder)
    model.is_loaded_in_4bit = True
    before = {name: copy.deepcopy(p) for name, p in model.named_parameters() if p.requires_grad}
    make(folder, tmp_path, model)
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])


def test_nothing_is_sent(folder, tmp_path, monkeypatch):
    def send(*args, **kwargs):
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", send)
    monkeypatch.delenv("CI", raising=False)
    assert make(folder, tmp_path)
