"""The callback in `transformers.Trainer`: the same run as the two calls, resume, best model."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from dynlora import DynamicLora, DynamicLoraCallback, DynamicLoraConfig
from dynlora.errors import EngineError, OptimizerError, ResumeError
from dynlora.integrations.checkpoint import load_state
from tests.models import WINDOW, adamw, bare_llama, lora_llama, sequences, train

STEPS = 24
CONFIG = {"hysteresis": 0.0, "shrink_tolerance": 1.0, **WINDOW}


class Sequences(Dataset):
    """Rows of the arithmetic sequence, always the same."""

    def __init__(self, count):
        batches = sequences(batch=count)
        self.rows = next(batches)

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


def trainer_of(
    model,
    folder,
    *,
    callbacks=(),
    dynamic=None,
    steps=STEPS,
    resume_from=None,
    model_init=None,
    **arguments,
):
    callback = DynamicLoraCallback(dynamic or DynamicLoraConfig(**CONFIG), resume_from=resume_from)
    settings = {
        "per_device_train_batch_size": 8,
        "optim": "adamw_torch",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1000,
        "dataloader_pin_memory": False,
    } | arguments
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=Sequences(8 * STEPS),
        eval_dataset=Sequences(16),
        callbacks=[callback, *callbacks],
        model_init=model_init,
    )
    return trainer, callback


def test_events_are_printed_unless_the_log_shows_them(tmp_path, capsys, caplog):
    trainer, callback = trainer_of(lora_llama(), tmp_path)
    trainer.train()
    printed = capsys.readouterr().out
    steps = [event.step for event in callback.dynamic.history]
    assert [int(step) for step in re.findall(r"^step (\d+): .*agreement", printed, re.M)] == steps
    assert printed.count("ranks are final; they moved at") == 1
    caplog.set_level("INFO", logger="dynlora")
    trainer_of(lora_llama(), tmp_path)[0].train()
    assert "agreement" not in capsys.readouterr().out
    assert "agreement" in caplog.text


def test_a_run_that_ends_before_its_first_event_says_so(tmp_path, caplog):
    trainer_of(lora_llama(), tmp_path, callbacks=[StopAt(1)])[0].train()
    assert "no rank moved: no event came before the end of the run" in caplog.text


def test_the_smallest_budget_is_searched_with_the_trainers_own_evaluation(tmp_path):
    """The trainer forgets what was due after a step when another evaluation ends."""
    config = DynamicLoraConfig(**CONFIG, budget_end="auto", budget_tolerance=1.0)
    due = {"logging_steps": 11, "eval_strategy": "steps", "eval_steps": 11}
    trainer, callback = trainer_of(lora_llama(r=8), tmp_path, dynamic=config, **due)
    callback.validate = lambda: trainer.evaluate(metric_key_prefix="tried")["tried_loss"]
    trainer.train()
    assert max(callback.dynamic.ranks.values()) <= 2
    assert callback.dynamic.history[-1].step == 22
    log = trainer.state.log_history
    for key in ("loss", "eval_loss"):
        assert [entry["step"] for entry in log if key in entry][:2] == [11, 22]


def saving(every):
    return {"save_strategy": "steps", "save_steps": every}


def keeping_the_best(*, every):
    """Return the arguments of a trainer that ends with the best of the checkpoints."""
    return {
        "eval_strategy": "steps",
        "eval_steps": every,
        **saving(every),
        "load_best_model_at_end": True,
    }


class Worse(TrainerCallback):
    """Makes the first evaluation the best."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def last_ranks(callback):
    layers = callback.dynamic.history[-1].layers
    return {name: layer.rank_after for name, layer in layers.items()}


def saved_ranks(checkpoint):
    return {name: shape["r"] for name, shape in load_state(checkpoint)["layers"].items()}


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run that nothing interrupted, the inputs of its model, and its folder."""
    folder, model, inputs = tmp_path_factory.mktemp("whole"), lora_llama(r=8), []
    trainer, callback = trainer_of(model, folder, **saving(12))
    original = model.forward
    model.forward = lambda **kwargs: (inputs.append(kwargs), original(**kwargs))[1]
    trainer.train()
    assert len(set(callback.dynamic.ranks.values())) > 1
    return SimpleNamespace(model=model, dynamic=callback.dynamic, inputs=inputs, folder=folder)


def test_callback_and_loop_give_bit_equal_runs(whole):
    model = lora_llama(r=8)
    optimizer = adamw(model, lr=5e-3, weight_decay=0.0)
    dynamic = DynamicLora(model, optimizer, DynamicLoraConfig(total_steps=STEPS, **CONFIG))
    train(model, optimizer, dynamic, STEPS, iter(whole.inputs))
    assert len(whole.inputs) == STEPS
    assert whole.dynamic.history == dynamic.history
    assert_equal_weights(lora_weights(whole.model), lora_weights(model))


def nothing(trainer, callback):
    """Leave a trainer as it is."""


def make_its_model_late(trainer, callback):
    def make():
        model = callback.prepare(lora_llama(r=8))
        torch.manual_seed(trainer.args.seed)  # which orders the rows
        return model

    trainer.model_init = make


def add_its_callback_late(trainer, callback):
    callback.close()
    trainer.remove_callback(callback)
    callback.prepare(trainer.model)
    trainer.add_callback(callback)


@pytest.mark.parametrize(
    ("killed_at", "change"),
    [(6, nothing), (20, nothing), (20, make_its_model_late), (20, add_its_callback_late)],
)
def test_a_run_resumed_from_the_trainers_checkpoint_ends_bit_for_bit_the_same(
    whole, killed_at, change, tmp_path
):
    cut, _ = trainer_of(lora_llama(r=8), tmp_path, callbacks=[StopAt(killed_at)], **saving(2))
    cut.train()
    torch.manual_seed(99)
    resumed, callback = trainer_of(lora_llama(r=8), tmp_path, **saving(2))
    change(resumed, callback)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS
    assert callback.dynamic.history == whole.dynamic.history
    assert_equal_weights(lora_weights(whole.model), lora_weights(resumed.model))


def flipped(name, end=b""):
    """Return what flips a bit of a checkpoint's file at the end of a text."""

    def harm(folder):
        content = bytearray((folder / name).read_bytes())
        content[content.rindex(end) + len(end) - 1] ^= 1
        (folder / name).write_bytes(content)

    return harm


def take_tensors_of_another_step(folder):
    shutil.copy(folder.with_name("checkpoint-4") / "dynlora.safetensors", folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the folder of a trainer that was stopped at step 8."""
    folder = tmp_path_factory.mktemp("stopped")
    trainer_of(lora_llama(), folder, callbacks=[StopAt(8)], **saving(4))[0].train()
    return folder


NOT_WHOLE = r"(?s)dynlora\.json.*checkpoint-8.*"
NOT_TOGETHER = f"{NOT_WHOLE}not as they were written together"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "dynlora.json").write_text("{}"), NOT_TOGETHER),
        (flipped("dynlora.json", b'"scaling": 2'), NOT_TOGETHER),
        (flipped("dynlora.safetensors"), NOT_TOGETHER),
        (take_tensors_of_another_step, NOT_TOGETHER),
        (lambda folder: (folder / "dynlora.json").unlink(), r"step 8 needs .*checkpoint-8"),
    ],
)
def test_a_state_that_is_not_whole_is_refused_with_its_file(harm, told, stopped, tmp_path):
    folder = tmp_path / "trainer"
    shutil.copytree(stopped, folder)
    harm(folder / "checkpoint-8")
    resumed, _ = trainer_of(lora_llama(), folder)
    with pytest.raises(ResumeError, match=told):
        resumed.train(resume_from_checkpoint=True)


def test_a_state_of_another_step_than_the_trainers_is_refused(stopped):
    resumed, _ = trainer_of(lora_llama(), stopped, resume_from=stopped / "checkpoint-4")
    with pytest.raises(ResumeError, match=r"checkpoint-4 must be of step 8.*got step 4"):
        resumed.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_layers_is_refused_with_one_of_them(stopped, tmp_path):
    other = lora_llama(target_modules=["q_proj"])
    with pytest.raises(ResumeError, match=r"this model's LoRA layers, got .* in one of them only"):
        trainer_of(other, tmp_path, resume_from=stopped / "checkpoint-8")


def test_a_run_that_is_given_a_checkpoint_starts_from_no_other_step(stopped, tmp_path):
    trainer, _ = trainer_of(lora_llama(), tmp_path, resume_from=stopped / "checkpoint-8")
    with pytest.raises(ResumeError, match=r"resume from .*checkpoint-8, but it starts from step 0"):
        trainer.train()


def test_a_state_of_another_run_is_refused_instead_of_emptying_the_weights(whole, tmp_path):
    other = lora_llama(r=8, seed=3)
    trainer_of(other, tmp_path / "other", callbacks=[StopAt(12)], **saving(12))[0].train()
    resumed, _ = trainer_of(lora_llama(r=8), tmp_path / "other")
    with pytest.raises(ResumeError, match=r"other/checkpoint-12 .*`DynamicLoraCallback\(resume_f"):
        resumed.train(resume_from_checkpoint=str(whole.folder / "checkpoint-12"))


def test_a_state_of_another_run_with_the_same_ranks_is_refused(tmp_path):
    settings = {"dynamic": DynamicLoraConfig(importance="uniform"), "steps": 4, "logging_steps": 1}
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        trainer_of(lora_llama(seed=seed), folder, **settings, **saving(4))[0].train()
    resumed, _ = trainer_of(lora_llama(), folders[0], **settings | {"steps": 6})
    with pytest.raises(ResumeError, match=r"one/checkpoint-4 .*another log"):
        resumed.train(resume_from_checkpoint=str(folders[1] / "checkpoint-4"))


def test_the_best_model_is_loaded_with_its_own_ranks_and_layer_weights(tmp_path):
    model = lora_llama(r=8)
    best = {}

    class Remember(TrainerCallback):
        """Makes an early evaluation the best, and keeps the weights it was made of."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - 8.0)
            if state.global_step == 8:
                best.update(lora_weights(model))

    trainer, callback = trainer_of(
        model,
        tmp_path,
        dynamic=DynamicLoraConfig(layer_weights=True, **CONFIG),
        callbacks=[Remember()],
        **keeping_the_best(every=4),
        greater_is_better=False,
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-8"
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    assert callback.dynamic.ranks == saved_ranks(checkpoint) == last_ranks(callback)
    assert callback.dynamic.ranks != saved_ranks(tmp_path / f"checkpoint-{STEPS}")
    assert_equal_weights(best, lora_weights(model))
    weights = {layer.weight for layer in callback.dynamic.history[-1].layers.values()}
    assert len(weights) > 1
    loaded = PeftModel.from_pretrained(bare_llama(), checkpoint)
    tokens = next(iter(Sequences(8)))["input_ids"][None]
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=tokens).logits for m in (model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_best_model_of_an_adapter_that_was_chosen_late_is_loaded_with_its_own_ranks(tmp_path):
    model = lora_llama(r=8)
    model.add_adapter("late", LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    best = keeping_the_best(every=2)
    trainer, callback = trainer_of(model, tmp_path, callbacks=[Worse()], **best)
    model.set_adapter("late")
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert set(last_ranks(callback).values()) != {8}
    assert set(callback.dynamic.ranks.values()) == {8}


def test_an_adapter_that_the_trainer_does_not_find_in_its_best_checkpoint_stays_as_it_is(
    tmp_path, caplog
):
    model = lora_llama(r=8, adapter_name="task")
    best = keeping_the_best(every=2)
    trainer, callback = trainer_of(model, tmp_path, callbacks=[Worse()], **best)
    trainer.train()
    last = last_ranks(callback)
    assert set(last.values()) != {8}
    assert callback.dynamic.ranks == last
    assert all(weight.any() for weight in lora_weights(model).values())
    assert "does not find adapter 'task' in its best checkpoint: load it from" in caplog.text


def test_the_best_model_is_loaded_into_a_model_that_the_trainer_made_anew(tmp_path):
    given = {"model_init": lambda: lora_llama(r=8), "callbacks": [Worse()]}
    trainer, callback = trainer_of(None, tmp_path, **given, **keeping_the_best(every=4))
    trainer.train()
    best, last = (saved_ranks(tmp_path / f"checkpoint-{step}") for step in (4, STEPS))
    assert callback.dynamic.ranks == best != last


@pytest.mark.parametrize("name", [None, lambda trial: f"mine-{trial.number}"])
def test_each_trial_of_a_search_has_our_state_in_its_own_checkpoints(name, tmp_path):
    given = {"model_init": lambda _: lora_llama(r=8), "steps": 8}
    trainer, _ = trainer_of(None, tmp_path, **given, **keeping_the_best(every=4))
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        hp_name=name,
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    ours = {path.parent for path in tmp_path.rglob("dynlora.json")}
    theirs = {path.parent for path in tmp_path.rglob("trainer_state.json")}
    assert ours == theirs
    assert len(ours) == 4


def test_each_trial_of_a_search_is_the_run_of_a_trainer_with_its_settings(tmp_path):
    models, histories = [], []
    given = {"model_init": lambda: lora_llama(r=8)}
    searched, callback = trainer_of(None, tmp_path, **given)

    def keep(metrics):
        models.append(searched.model)
        histories.append(callback.dynamic.history)
        return metrics["eval_loss"]

    searched.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": (1e-3, 5e-3)[trial.number]},
        compute_objective=keep,
        n_trials=2,
        backend="optuna",
        direction="minimize",
    )
    alone, control = trainer_of(None, tmp_path, **given)
    alone.train()
    assert len(set(control.dynamic.ranks.values())) > 1
    assert histories[0] != histories[1] == control.dynamic.history
    assert_equal_weights(lora_weights(models[1]), lora_weights(alone.model))


def test_train_called_twice_works_and_attaches_once(tmp_path):
    model = lora_llama(r=8)
    trainer, callback = trainer_of(model, tmp_path)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    trainer.train()
    ranks = callback.dynamic.ranks
    trainer.train()
    assert len(callback.dynamic.history) == callback.config.events
    assert len(set(ranks.values())) > 1
    assert hooks() == before
    config = model.peft_config["default"]
    assert callback.dynamic.parameters <= callback.dynamic.budget
    assert set(config.rank_pattern.values()) <= set(callback.dynamic.ranks.values())


def test_gradient_accumulation_and_clipping_are_over_before_gradients_are_observed(tmp_path):
    seen = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.stack(norms).norm()))

    trainer, callback = trainer_of(
        lora_llama(),
        tmp_path,
        callbacks=[Norms()],
        steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0.01,
    )
    trainer.train()
    assert len(seen) == 6 == callback.dynamic._step
    assert all(norm <= 0.01 * (1 + 1e-4) for norm in seen)


def test_an_optimizer_that_cannot_follow_is_refused_by_name(tmp_path):
    trainer, _ = trainer_of(lora_llama(), tmp_path, optim="rmsprop")
    with pytest.raises(OptimizerError, match=r"torch\.optim\.AdamW.*got .*\.RMSprop"):
        trainer.train()


def test_compiled_training_gives_the_ranks_and_weights_of_training_that_is_not(tmp_path):
    models = [lora_llama(r=8).double() for _ in range(2)]
    plain, _ = trainer_of(models[0], tmp_path)
    plain.train()
    compiled, callback = trainer_of(
        models[1], tmp_path, torch_compile=True, torch_compile_backend="eager"
    )
    compiled.train()
    assert len(set(callback.dynamic.ranks.values())) > 1
    for name, weight in models[0].state_dict().items():
        assert torch.allclose(models[1].state_dict()[name], weight, rtol=0, atol=1e-6), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("enable_jit_checkpoint", True, "got enable_jit_checkpoint=True"),
        ("deepspeed_plugin", SimpleNamespace(zero_stage=0), "got DeepSpeed with zero_stage=0: "),
        ("fsdp", "full_shard", "got FSDP1: "),
    ],
)
def test_arguments_under_which_no_run_could_resume_are_refused(name, value, message, tmp_path):
    trainer, callback = trainer_of(lora_llama(), tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(EngineError, match=message):
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_fsdp2_ends_with_the_last_weights(tmp_path, monkeypatch):
    trainer, callback = trainer_of(lora_llama(), tmp_path)
    plugin = SimpleNamespace(fsdp_version=2)
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(EngineError, match="got load_best_model_at_end under FSDP2 or DeepSpeed: "):
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
