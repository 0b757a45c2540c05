"""Variants of LoRA for comparison: DoRA, and adapters that begin otherwise, through the CLI."""

import pytest

from tests.cli.finished import (
    assert_last_steps_resume_exactly,
    assert_same_weights,
    facts,
    finish,
    loss_on,
    read_json,
    read_lines,
    run_job,
    stock_model,
    weights,
)
from tests.language import language_job, save_language_model, write_pairs

STARTS = ("gaussian", "orthogonal", "eva", "olora", "pissa", "pissa_niter_4")
DOUBLED = {"olora", "pissa", "pissa_niter_4"}
START = "init_lora_weights"
PISSA = f"{START}=pissa --method=lora"
LAYERS = 2 * (4 * (16 + 16) + 2 * (16 + 32)) + 16 + 16  # two blocks and the pooler, a rank each
OUTPUTS = 2 * (5 * 16 + 32) + 16
HEAD = 34


def lora_count(run):
    return sum(t.numel() for name, t in weights(run).items() if ".lora_" in name)


@pytest.mark.parametrize("start", STARTS)
def test_each_start_begins_at_the_models_outputs_and_saves_a_plain_adapter(
    train, said, output, model, data, finished_by, start
):
    rslora = ("--lora.use_rslora", str(start == "pissa"))
    options = ("--method", "lora", "--lora.init_lora_weights", start, "--training.seed", "1")
    assert train(*options, *rslora) == 0
    run = facts(output)
    plain = facts(finished_by("lora"))["metrics_before"]["loss"]
    assert run["metrics_before"]["loss"] == pytest.approx(plain, abs=1e-5)
    after = run["metrics_after"]["loss"]
    assert after < plain
    trained = dict.fromkeys(("start", "peak", "end"), 2 * LAYERS)
    held = (2 if start in DOUBLED else 1) * 2 * LAYERS
    assert run["budget"] == 2 * LAYERS
    assert run["parameters"] == trained | ({"saved": held} if start in DOUBLED else {})
    assert lora_count(output) == held
    assert any("classifier" in name for name in weights(output)), "the head is saved too"
    saved = read_json(output / "adapter" / "adapter_config.json")
    assert saved["init_lora_weights"] is True
    assert saved["r"] == (4 if start in DOUBLED else 2)
    assert loss_on(data, stock_model(output, model), model) == pytest.approx(after, abs=1e-5)
    assert said("eval", output)["metrics"]["loss"] == pytest.approx(after, abs=1e-5)
    if start in ("pissa", "eva"):
        assert 0 < run["adapter_start_seconds"] < run["seconds"]["training_steps"]
        assert_last_steps_resume_exactly(output)
        assert facts(output)["adapter_start_seconds"] == run["adapter_start_seconds"]
    assert facts(finished_by("lora"))["adapter_start_seconds"] == 0


def test_the_best_checkpoint_of_another_start_is_what_is_saved(train, output, model, data):
    best = ("--training.load_best_model_at_end", "true", "--training.save", "epoch")
    rate = ("--training.learning_rate", 1, "--training.epochs", 4)  # so it does not only get better
    assert train(*f"--lora.{PISSA}".split(), *best, *rate, "--training.best_metric", "loss") == 0
    after = facts(output)["metrics_after"]["loss"]
    losses = [line["eval_loss"] for line in read_lines(output / "metrics.jsonl")
              if line.get("eval_loss") is not None]  # fmt: skip
    assert after == pytest.approx(min(losses[1:]), rel=1e-5)
    assert loss_on(data, stock_model(output, model), model) == pytest.approx(after, rel=1e-4)


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(("method", "counted"), [("lora", OUTPUTS), ("dynamic", 0)])
def test_dora_trains_saves_reloads_and_resumes_and_a_dynamic_budget_has_no_magnitudes(
    train, said, output, model, data, method, counted
):
    assert train("--method", method, "--lora.use_dora", "true") == 0
    run = facts(output)
    parameters = run["parameters"]
    assert parameters["start"] == run["budget"] == 2 * LAYERS + counted
    assert parameters["end"] == lora_count(output) - OUTPUTS + counted <= run["budget"]
    assert run["other_parameters"] == HEAD + OUTPUTS - counted
    assert bool(read_json(output / "adapter" / "adapter_config.json")["rank_pattern"]) == (
        method == "dynamic"
    )
    assert "saved" not in parameters
    after = run["metrics_after"]["loss"]
    assert loss_on(data, stock_model(output, model), model) == pytest.approx(after, abs=1e-5)
    assert said("eval", output)["metrics"]["loss"] == pytest.approx(after, abs=1e-6)
    assert_last_steps_resume_exactly(output)


def test_lora_and_dynamic_begin_alike_with_eva(tmp_path, model, data):
    options = (
        "--lora.init_lora_weights=eva", "--training.max_steps=1", "--dynamic.importance=uniform",
        "--dynamic.layer_weights=false", "--dynamic.fused=false",
    )  # fmt: skip
    assert_same_weights(*(
        finish(tmp_path / method, model, data, *options, f"--method={method}")
        for method in ("lora", "dynamic")
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            f"{START}=pissa",
            "orthogonal or eva with `method: dynamic`, but got pissa",
        ),
        (f"{START}=eva --method=adalora", "`method: adalora`, but got eva"),
        ("use_dora=true --method=full", "`method: full`, but got true"),
        (f"{START}=false", "got false, which starts with random"),
        (f"{START}=pisa", "pisa"),
        (
            f"{START}=orthogonal --lora.r=3 --method=lora",
            "must be even with `lora.init_lora_weights: orthogonal`, but got 3.",
        ),
        (
            f"{PISSA} --lora.use_dora=true",
            "false with `lora.init_lora_weights: pissa`, but got true",
        ),
        (
            f"{START}=olora --model.dtype=bfloat16 --method=lora",
            "float32 with `lora.init_lora_weights: olora`, but got bfloat16",
        ),
        (
            f"{PISSA} --model.quantization=nf4",
            "`model.quantization` must be null with `lora.init_lora_weights: pissa`, but got nf4",
        ),
        (f"{PISSA} --lora.r=17", "at least lora.r=17 inputs and outputs, got 'bert.encoder.layer."),
        (f"{START}=eva --lora.r=12 --method=lora", "inputs that vary in lora.r=12 directions"),
    ],
)
def test_what_does_not_fit_together_is_told(error, options, told):
    assert told in error(*f"--lora.{options}".split())


@pytest.mark.parametrize(
    "lora", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "eva"}, {"use_dora": True}]
)
def test_a_saved_adapter_of_a_language_model_is_as_good_as_what_was_trained(
    tmp_path, output, lora, said
):
    llama = save_language_model(tmp_path / "llama")
    values = language_job(llama, write_pairs(tmp_path / "pairs"), output) | {"method": "lora"}
    values["lora"] |= lora
    run_job(tmp_path, values)
    after = facts(output)["metrics_after"]["loss"]
    assert after < facts(output)["metrics_before"]["loss"]
    assert said("eval", output)["metrics"]["loss"] == pytest.approx(after, abs=1e-5)
