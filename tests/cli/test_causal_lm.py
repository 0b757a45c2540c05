"""`dynlora train` with `task: causal_lm`: every format and method, resumed, and bad input."""

import csv
import math
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from dynlora.engines.checks import keep_gradients
from dynlora.importance.agreement import AgreementTest
from tests.cli.finished import (
    assert_same_end,
    assert_same_weights,
    facts,
    losses,
    read_json,
    read_lines,
    run_job,
    stopped_at,
    weights,
)
from tests.jobs import missing, write_job, write_rows
from tests.language import (
    language_job,
    make_pairs,
    save_language_model,
    write_pairs,
    write_two_splits,
)

DROPOUT = ("--lora.lora_dropout=0.1", "--training.save_steps=2")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), validation=14)


@pytest.fixture
def job(tmp_path, model, data, output):
    return write_job(tmp_path / "job.yaml", language_job(model, data, output))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory, model, data):
    """Return a finished run whose ranks moved; no test may change it."""
    folder = tmp_path_factory.mktemp("dynamic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        return run_job(folder, language_job(model, data, folder / "run"), *DROPOUT)


@torch.no_grad()
def completions(model, folder, data, split="validation"):
    """Yield logits and ids of each completion's tokens, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in read_lines(data / f"{split}.jsonl"):
        start = len(tokenizer(row["ask"] + "\n")["input_ids"])
        ids = torch.tensor(tokenizer(f"{row['ask']}\n{row['tell']}<eos>")["input_ids"])
        yield model.eval()(input_ids=ids[None]).logits[0, start - 1 : -1], ids[start:]


def completion_loss(model, folder, data):
    """Return the mean loss of the completions' tokens."""
    parts = [cross_entropy(*part, reduction="none") for part in completions(model, folder, data)]
    return float(torch.cat(parts).mean())


def divergence(model, teacher, data, split="validation"):
    """Return the mean Kullback-Leibler divergence of the completions' tokens from a teacher's."""
    loaded = AutoModelForCausalLM.from_pretrained(teacher)
    wanted, found = (
        torch.cat([logits.softmax(dim=1) for logits, _ in completions(each, teacher, data, split)])
        for each in (loaded, model)
    )
    return float((wanted * (wanted / found).log()).sum(dim=1).mean())


def same_rows(count=24):
    """Return rows of ShareGPT, of Alpaca, and the same rows as messages and as pairs."""
    pairs = make_pairs(count)
    roles = {"user": "human", "assistant": "gpt"}
    shared, alpaca, plain = [], [], []
    for number, row in enumerate(pairs):
        talk = [{"from": roles[m["role"]], "value": m["content"]} for m in row["chat"]]
        more = None if number % 3 else "cat"
        shared.append({"conversations": talk})
        alpaca.append({"instruction": row["ask"], "input": more, "output": row["tell"]})
        asked = row["ask"] if more is None else f"{row['ask']}\n{more}"
        plain.append({"ask": asked, "tell": row["tell"]})
    return {"ShareGPT": (shared, pairs, "messages"), "Alpaca": (alpaca, plain, "pairs")}


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["ShareGPT", "Alpaca"])
def test_usual_columns_are_found_and_learned_as_the_same_rows_elsewhere(
    name, ending, model, tmp_path, said
):
    found, plain, form = same_rows()[name]
    runs = []
    for rows, keys, file in ((found, "text", f"own{ending}"), (plain, form, "plain.jsonl")):
        path = write_rows(tmp_path / file, rows)
        values = language_job(model, path, tmp_path / file[:3] / "run", keys)
        runs.append(run_job(tmp_path / file[:3], values, "--training.max_steps", 2))
    assert_same_weights(*runs)
    written = yaml.safe_load((runs[0] / "config.yaml").read_text())["data"]
    given = (written["messages"], written["prompt"], written["completion"])
    alpaca = (None, ["instruction", "input"], "output")
    assert given == (alpaca if name == "Alpaca" else ("conversations", None, None))
    asked = [{key: row[key] for key in ("instruction", "input") if key in row} for row in found]
    rows = write_rows(tmp_path / f"ask{ending}", asked if name == "Alpaca" else found)
    told = [said("predict", *each) for each in zip(runs, (rows, path), strict=True)]
    assert told[0]["predictions"] == told[1]["predictions"]


@pytest.fixture
def large(monkeypatch):
    """Let files of a few hundred bytes count as large."""
    for place in ("files.tables.ROWS", "train.data.splits.ROWS", "train.data.language.ROWS"):
        monkeypatch.setattr(f"dynlora.{place}", 5)
    monkeypatch.setattr("dynlora.files.tables.LARGE", 200)
    monkeypatch.setattr("dynlora.files.tables.BLOCK", 600)


@pytest.mark.parametrize(
    ("ending", "form"),
    [(".csv", "pairs"), (".parquet", "messages"), (".jsonl", "messages"), (".json", "as_chat")],
)
def test_rows_of_a_large_file_are_learned_from_disk_as_those_of_a_small_one(
    ending, form, model, tmp_path, request
):
    columns = {"messages": ["chat"]}.get(form, ["ask", "tell"])
    runs, rows = [], [{name: row[name] for name in columns} for row in make_pairs(24)]
    for size in ("small", "large"):
        path = write_rows(tmp_path / f"{size}{ending}", rows)
        if size == "large":
            request.getfixturevalue("large")
        values = language_job(model, path, tmp_path / size / "run", form)
        runs.append(run_job(tmp_path / size, values, "--training.max_steps", 3))
    assert_same_weights(*runs)
    small, large = (facts(run)["rows_sha256"] for run in runs)
    assert small == large


@pytest.mark.usefixtures("large")
def test_an_invalid_row_of_a_large_file_is_named(error, job, model, output, tmp_path):
    rows = [*make_pairs(12), {"ask": "red", "tell": None}, *make_pairs(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    write_job(job, language_job(model, path, output))
    assert missing(error("--data.validation_rows_from_train", 1), "None in row 12") == []


@pytest.mark.parametrize("method", ["lora", "dynamic"])
def test_packed_rows_have_the_loss_of_rows_apart(method, train, output):
    runs = []
    for packing in ("false", "true"):
        options = ("--training.packing", packing, "--training.batch_size", 48)
        assert train(*options, "--method", method, "--training.epochs", 2) == 0
        lines = read_lines(output / "metrics.jsonl")
        runs.append((facts(output), [line["loss"] for line in lines if "loss" in line]))
        output.rename(output.with_name(packing))
    (apart, first), (packed, again) = runs
    assert packed["rows"]["train"] < 48 == apart["rows"]["train"]
    assert packed["metrics_before"] == pytest.approx(apart["metrics_before"], abs=1e-6)
    assert packed["metrics_after"] == pytest.approx(apart["metrics_after"], abs=1e-4)
    assert again == pytest.approx(first, abs=1e-5)


def test_the_optimizer_and_noise_are_the_trainers(train, output):
    ends = {}
    for key, value in (("optim", "adamw_torch"), ("optim", "sgd"), ("neftune_noise_alpha", 5)):
        options = (f"--training.{key}", value, "--training.max_steps", 2, "--training.save_steps=2")
        assert train(*options, "--overwrite", "true") == 0
        state = torch.load(output / "checkpoints" / "checkpoint-2" / "optimizer.pt")["state"]
        assert any("exp_avg" in each for each in state.values()) == (value != "sgd")
        ends[value] = facts(output)["metrics_before"], losses(output)
    (before, plain), (same, _), (alike, noisy) = ends.values()
    assert before == same == alike
    assert plain[1] != noisy[1], "the loss of the first step"


# peft 0.21 reads AdaLoRA's masks as rank patterns too.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", ["dynamic", "adalora", "full"])
def test_stock_libraries_load_what_is_saved_and_find_the_reported_loss(
    train, output, dynamic, model, data, method
):
    options = ("--adalora.orth_reg_weight", 10, "--training.learning_rate", 3e-3)
    assert method == "dynamic" or train("--method", method, *options) == 0
    folder = dynamic if method == "dynamic" else output
    run = facts(folder)
    base = AutoModelForCausalLM.from_pretrained(model)
    before, after = run["metrics_before"], run["metrics_after"]
    assert completion_loss(base, model, data) == pytest.approx(before["loss"], abs=1e-5)
    if method == "full":
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    else:
        loaded = PeftModel.from_pretrained(base, folder / "adapter")
        config = read_json(folder / "adapter" / "adapter_config.json")
        assert config["base_model_name_or_path"] == str(model)
        assert config["task_type"] == "CAUSAL_LM"
    assert completion_loss(loaded, model, data) == pytest.approx(after["loss"], abs=1e-5)
    assert after["loss"] < before["loss"]
    for metrics in (before, after):
        assert set(metrics) == {"token_accuracy", "perplexity", "loss"}
        assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    if method == "dynamic":
        assert len(set(run["final_ranks"].values())) > 1, "this test is about ranks that moved"
        assert len(run["final_ranks"]) == 14, "the head has no adapter"


@pytest.mark.parametrize(
    ("quantization", "key"),
    [("null", "activation_checkpointing"), ("nf4", "gradient_checkpointing")],
)
def test_activation_checkpointing_repeats_forwards_and_changes_no_weight(
    train, output, monkeypatch, quantization, key
):
    passed, once = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: passed.append(1) or once(self, x))
    found = {}
    for value in ("false", "true"):
        passed.clear()
        options = (f"--training.{key}", value, "--overwrite", "true")
        assert train("--model.quantization", quantization, "--method", "dynamic", *options) == 0
        found[value] = len(passed), weights(output)
    assert found["true"][0] > found["false"][0]
    torch.testing.assert_close(found["true"][1], found["false"][1], rtol=0, atol=0)


def test_the_adapter_of_a_quantized_model_learns_the_outputs_before_quantization(
    train, output, model, data
):
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    small = AutoModelForCausalLM.from_pretrained(model, quantization_config=bits)
    keep_gradients(small)
    before = divergence(small, model, data)
    options = ("--model.quantization", "nf4", "--model.teacher", "unquantized")
    assert train(*options, "--training.epochs", 8) == 0
    loaded = PeftModel.from_pretrained(small, output / "adapter")
    assert 0 < divergence(loaded, model, data) < before / 2


def test_the_loss_with_a_teacher_is_the_divergence_from_its_outputs(
    train, output, model, data, tmp_path
):
    teacher = save_language_model(tmp_path / "teacher", seed=1)
    options = ("--training.batch_size", 48, "--training.max_steps", 1, "--training.bf16", "false")
    assert train("--model.teacher", teacher, "--method", "lora", *options) == 0
    student = AutoModelForCausalLM.from_pretrained(model)
    first = next(line for line in read_lines(output / "metrics.jsonl") if "loss" in line)
    assert first["loss"] == pytest.approx(divergence(student, teacher, data, "train"), abs=1e-5)


def test_a_teacher_of_another_vocabulary_is_refused(error, model, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(model)
    teacher.resize_token_embeddings(40)
    teacher.save_pretrained(tmp_path / "teacher")
    told = "`model.teacher` must be a model of the same vocabulary | 40 tokens | 24 in the model"
    assert missing(error("--model.teacher", tmp_path / "teacher", "--dry-run"), told) == []


@pytest.mark.parametrize("form", ["text", "as_chat", "messages"])
def test_formats_besides_pairs_are_learned(train, job, model, data, output, form):
    write_job(job, language_job(model, data, output, form))
    assert train("--method", "lora") == 0
    run = facts(output)
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"] - 0.1
    assert run["num_labels"] is None
    assert run["texts_cut"] == {"train": 0, "validation": 0}


def test_a_csv_file_of_words_that_look_like_numbers_is_read_as_text(said, job, tmp_path):
    for split in ("train", "validation"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["ask", "tell"], ["1", "2"], ["3", "4"]])
    found = said("train", job, "--data.path", tmp_path, "--dry-run")
    assert (found["train_rows"], found["validation_rows"]) == (2, 2)


@pytest.mark.usefixtures("moving")
def test_a_stopped_run_resumes_to_the_same_bits(train, output, dynamic):
    with stopped_at(5), pytest.raises(SystemExit):
        train(*DROPOUT)
    assert train(*DROPOUT, "--training.resume", "latest") == 0
    assert facts(output)["resumed_from_step"] == 4
    assert_same_end(dynamic, output)


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    "options",
    [
        ("--method", "full", *DROPOUT),
        ("--model.quantization", "nf4"),
        ("--model.dtype", "bfloat16"),
    ],
    ids=["full", "nf4", "bfloat16"],
)
def test_trained_weights_are_in_float32_and_a_stopped_run_resumes_exactly(train, output, options):
    assert train(*options) == 0
    assert {tensor.dtype for tensor in weights(output).values()} == {torch.float32}
    run = facts(output)
    assert run["metrics_after"]["loss"] < run["metrics_before"]["loss"] - 0.1
    whole = output.rename(output.with_name("whole"))
    with stopped_at(7), pytest.raises(SystemExit):
        train(*options)
    assert train(*options, "--training.resume", "latest") == 0
    assert facts(output)["resumed_from_step"] in (5, 6)
    assert_same_end(whole, output)


def test_the_best_checkpoint_is_found_by_token_accuracy(train, output):
    options = ("--training.load_best_model_at_end", "true", "--training.save", "epoch")
    assert train(*options, "--training.epochs", 3) == 0
    lines = read_lines(output / "metrics.jsonl")
    seen = [line["eval_token_accuracy"] for line in lines if line.get("epoch") in (1, 2, 3)
            and "eval_loss" in line]  # fmt: skip
    assert facts(output)["metrics_after"]["token_accuracy"] == pytest.approx(max(seen), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("data.completion=null", "`data.prompt` and `data.completion` | only"),
        ("data.messages=chat", "`data.messages` must be null with `data.prompt`"),
        (
            "data.prompt=null --data.completion=null --data.messages=chats",
            "`data.messages` names the column 'chats'",
        ),
        ("data.max_new_tokens=0", "`data.max_new_tokens` | >= 1 | got 0"),
        ("data.max_new_tokens=64", "`data.max_new_tokens` | within the 64 tokens | got 64"),
        ("data.max_length=65", "`data.max_length` | at most 64 | got 65"),
        ("lora.target_modules=[lm_head]", "leave out | lm_head | modules_to_save"),
        (
            "method=full --model.quantization=nf4",
            "`model.quantization` | null with `method: full` | got nf4",
        ),
        (
            "method=full --model.dtype=bfloat16",
            "`model.dtype` | float32 with `method: full` | got bfloat16",
        ),
        ("model.quantization=nf5", "`model.quantization` | nf4 | int8 | nf5"),
        ("model.teacher=unquantized", "`model.teacher` | without `model.quantization`"),
        ("model.teacher=x --task=regression", "`model.teacher` | null with `task: regression`"),
    ],
)
def test_settings_that_do_not_fit_are_told_what_does(error, options, told):
    assert missing(error(*f"--{options}".split()), told) == []


SILENT = [{"role": "user", "content": "red"}, {"role": "assistant", "content": ""}]


def test_rows_whose_answers_are_all_empty_are_refused(error, job, model, output, tmp_path):
    rows = [
        row | {"tell": " " * (place % 2), "chat": SILENT} for place, row in enumerate(make_pairs(6))
    ]
    data = write_two_splits(tmp_path / "empty", rows)
    for form, column in (("pairs", "tell"), ("as_chat", "tell"), ("messages", "chat")):
        write_job(job, language_job(model, data, output, form))
        told = f"column '{column}' must hold an answer to learn in at least one row"
        assert missing(error(), told, "all of the training split") == []


def test_the_length_of_predictions_is_an_option(train, said, refused, output, data):
    assert train("--method", "lora", "--training.max_steps", 1) == 0, "too few to learn to end"
    command = ["predict", output, data / "validation.jsonl"]
    given = {count: ["--max-new-tokens", count] for count in (1, 6, 63)} | {"own": []}
    found = {
        count: [row["prediction"] for row in said(*command, *options)["predictions"]]
        for count, options in given.items()
    }
    assert found["own"] == found[6] != found[1]
    assert all(long.startswith(short) for short, long in zip(found[1], found[6], strict=True))
    assert "within the 64 tokens" in refused(*command, "--max-new-tokens", 64)


def test_a_finished_run_is_evaluated_and_predicts_whatever_the_batch(dynamic, data, said):
    assert said("eval", dynamic)["metrics"] == facts(dynamic)["metrics_after"]
    command = ["predict", dynamic, data / "validation.jsonl", "--batch-size"]
    alone, together = (said(*command, size)["predictions"] for size in (1, 5))
    assert len(alone) == 14
    assert alone == together


@pytest.mark.parametrize("form", ["pairs", "messages"])
def test_eval_counts_rows_with_the_answer_that_the_model_writes(form, model, data, said, tmp_path):
    short = ("--training.max_steps=2", "--method=lora")
    run = run_job(tmp_path, language_job(model, data, tmp_path / "run", form), *short)
    rows = read_lines(data / "validation.jsonl")
    found = said("predict", run, data / "validation.jsonl")["predictions"]
    for place, row in enumerate(rows):
        row["tell"] = f" {found[place]['prediction']}" if place < 5 else "never written"
        row["chat"][-1]["content"] = row["tell"]
    answered = write_rows(tmp_path / "answered.jsonl", rows)
    values = said("eval", run, "--data", answered, "--exact-match")
    assert values["metrics"]["exact_match"] == 5 / len(rows)


def test_whole_texts_have_no_answers_to_count(model, data, refused, tmp_path):
    job = language_job(model, data, tmp_path / "run", "text")
    run = run_job(tmp_path, job, "--training.max_steps=2", "--method=lora")
    assert "the run's rows are whole texts" in refused("eval", run, "--exact-match")


def test_what_is_cut_and_what_is_left_out_is_told(train, tmp_path, output, capsys):
    rows = [
        {"ask": "red", "tell": "cat"},
        {"ask": "red", "tell": " ".join(["cat"] * 8)},
        {"ask": " ".join(["red"] * 8), "tell": "cat"},
    ]
    folder = write_two_splits(tmp_path / "long", rows)
    options = ("--data.max_length", 8, "--method", "lora", "--training.max_steps", 1)
    assert train("--data.path", folder, *options) == 0
    told = (
        "note: 1 of 3 training rows were left out: within data.max_length=8 tokens | "
        "note: 1 of 2 training and 1 of 2 validation inputs are longer than"
    )
    assert missing(capsys.readouterr().err, told) == []
    assert facts(output)["rows"] == {"train": 2, "validation": 2}
    assert facts(output)["texts_cut"] == {"train": 1, "validation": 1}


def test_a_prompt_without_any_token_is_refused_by_its_row(dynamic, refused, tmp_path):
    run = shutil.copytree(dynamic, tmp_path / "copy")
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["data"]["separator"] = ""
    write_job(run / "config.yaml", values)
    rows = write_rows(tmp_path / "rows.jsonl", [{"ask": "red"}, {"ask": ""}])
    message = refused("predict", run, rows)
    assert missing(message, "the prompt must have at least one token | '' in row 1") == []
