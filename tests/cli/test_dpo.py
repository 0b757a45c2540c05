"""`dynlora train` with `task: dpo`: preferences are learned, saved, resumed, and bad rows."""

import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynlora.importance.agreement import AgreementTest
from dynlora.train.config import METRICS
from tests.cli.finished import (
    assert_same_end,
    assert_same_weights,
    facts,
    losses,
    read_lines,
    run_job,
    stopped_at,
    weights,
)
from tests.jobs import job_values, missing, write_job, write_rows
from tests.language import make_pairs, save_language_model, write_two_splits

BETA = 0.3
ANSWERS = ("chosen", "rejected")
ROWS = 14


def make_preferences(count, seed=0):
    rows = make_pairs(count, seed=seed)
    return [{"prompt": row["ask"], **{name: row[name] for name in ANSWERS}} for row in rows]


def forms(rows):
    """Return the same rows in each form, and the keys of section `data` that it needs."""
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    told = [
        {name: [{"role": "assistant", "content": row[name]}] for name in ANSWERS} for row in rows
    ]
    pairs = list(zip(asked, told, strict=True))
    whole = [{name: ask + tell[name] for name in ANSWERS} for ask, tell in pairs]
    return {
        "as chat": (rows, {"prompt": "prompt", "as_chat": True}),
        "conversations": ([{"prompt": ask} | tell for ask, tell in pairs], {}),
        "whole conversations": (whole, {}),
        "beside the prompt as a text": (
            [row | tell for row, tell in zip(rows, whole, strict=True)],
            {},
        ),
    }


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences")
    write_rows(folder / "train.jsonl", make_preferences(48, seed=1))
    write_rows(folder / "validation.jsonl", make_preferences(ROWS, seed=2))
    return folder


def dpo_job(model, data, output):
    values = job_values(model, data, output) | {"task": "dpo"}
    values["data"] |= {"max_length": 48, "max_new_tokens": 6}
    values["training"] |= {"dpo_beta": BETA, "eval_batch_size": 4}
    return values


@pytest.fixture
def job(tmp_path, model, data, output):
    return write_job(tmp_path / "job.yaml", dpo_job(model, data, output))


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory, model, data):
    """Return a finished run whose ranks moved; no test may change it."""
    folder = tmp_path_factory.mktemp("dynamic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreementTest, "is_significant", lambda self: True)
        return run_job(folder, dpo_job(model, data, folder / "run"))


@torch.no_grad()
def answer_log_prob(model, tokenizer, prompt, answer):
    """Return the log-probability of an answer's tokens and its end, after the prompt."""
    start = len(tokenizer(f"{prompt}\n")["input_ids"])
    ids = torch.tensor(tokenizer(f"{prompt}\n{answer}<eos>")["input_ids"])
    found = model(input_ids=ids[None]).logits[0, start - 1 : -1].log_softmax(dim=1)
    return float(found.gather(1, ids[start:, None]).sum())


def expected_metrics(tuned, reference, folder, data, beta=BETA):
    """Return the metrics of the validation rows, one answer at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    margins = []
    for row in read_lines(data / "validation.jsonl"):
        ratios = [
            answer_log_prob(tuned, tokenizer, row["prompt"], row[name])
            - answer_log_prob(reference, tokenizer, row["prompt"], row[name])
            for name in ANSWERS
        ]
        margins.append(beta * (ratios[0] - ratios[1]))
    return {
        "reward_accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "reward_margin": sum(margins) / len(margins),
        "loss": sum(math.log(1 + math.exp(-margin)) for margin in margins) / len(margins),
    }


def test_stock_libraries_find_the_reported_metrics_which_begin_at_log_2(dynamic, model, data):
    run = facts(dynamic)
    before, after = run["metrics_before"], run["metrics_after"]
    assert before == pytest.approx({"reward_accuracy": 0, "reward_margin": 0, "loss": math.log(2)})
    reference, base = (AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2))
    tuned = PeftModel.from_pretrained(base, dynamic / "adapter").eval()
    assert after == pytest.approx(expected_metrics(tuned, reference, model, data), abs=1e-4)
    assert after["reward_accuracy"] > 0.9
    assert after["loss"] < before["loss"] - 0.1
    assert list(after) == list(METRICS["dpo"])
    assert len(set(run["final_ranks"].values())) > 1, "this test is about ranks that moved"
    assert run["parameters"]["peak"] <= run["budget"]
    assert not any("ref" in name.split(".") for name in weights(dynamic))
    assert not (dynamic / "adapter" / "ref").exists()


@pytest.mark.usefixtures("moving")
def test_a_stopped_run_resumes_to_the_same_bits(train, output, dynamic):
    with stopped_at(7), pytest.raises(SystemExit):
        train()
    assert train("--training.resume", "latest") == 0
    assert facts(output)["resumed_from_step"] == 5
    assert_same_end(dynamic, output)


def test_eval_and_predict_read_a_run(dynamic, model, data, said, refused, tmp_path):
    for options in ([], ["--data", data / "validation.jsonl"]):
        values = said("eval", dynamic, *options)
        assert values["metrics"] == facts(dynamic)["metrics_after"]
        assert values["rows"] == ROWS
    asked = [{"prompt": row["prompt"]} for row in make_preferences(3, seed=2)]
    file = write_rows(tmp_path / "asked.jsonl", asked)
    found = said("predict", dynamic, file, "--max-new-tokens", 3)["predictions"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    tuned = PeftModel.from_pretrained(base, dynamic / "adapter").eval()
    for row, one in zip(asked, found, strict=True):
        ids = tokenizer(f"{row['prompt']}\n", return_tensors="pt")
        made = tuned.generate(**ids, do_sample=False, max_new_tokens=3)[0]
        told = tokenizer.decode(made[ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert one["prediction"] == told
    without = write_rows(tmp_path / "without.jsonl", [{"text": "red"}])
    assert "`data.prompt` names the column 'prompt'" in refused("predict", dynamic, without)


def test_advise_reads_the_losses_of_pairs(job, said):
    assert said("advise", job, "--minutes", 0.05)["rows"]["validation"] == ROWS


@pytest.mark.parametrize("form", list(forms([]))[1:])
def test_rows_in_each_form_are_learned_and_answered_alike(form, model, tmp_path, said):
    runs, answers = [], []
    for name in ("as chat", form):
        rows, keys = forms(make_preferences(24, seed=1))[name]
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        file = write_rows(folder / "rows.jsonl", rows)
        values = dpo_job(model, file, folder / "run")
        values["data"] |= keys
        runs.append(run_job(folder, values, "--training.max_steps", 2))
        answers.append(said("predict", runs[-1], file, "--max-new-tokens", 3)["predictions"])
    assert_same_weights(*runs)
    assert losses(runs[0]) == losses(runs[1])
    assert answers[0] == answers[1]


def test_texts_that_contain_their_prompt_are_those_of_a_prompt(train, output, tmp_path, dynamic):
    for split, rows in (
        ("train", make_preferences(48, 1)),
        ("validation", make_preferences(14, 2)),
    ):
        whole = [{name: f"{row['prompt']}\n{row[name]}" for name in ANSWERS} for row in rows]
        write_rows(tmp_path / "whole" / f"{split}.jsonl", whole)
    options = ("--data.path", tmp_path / "whole", "--training.max_steps", 1)
    assert train(*options, "--lora.start_from", dynamic / "adapter") == 0
    # The reference has no adapter, so that a run from an adapter begins where that one ended.
    run, earlier = facts(output), facts(dynamic)
    assert run["metrics_before"] == pytest.approx(earlier["metrics_after"], abs=1e-6)


def texts(**changes):
    return [row | changes for row in make_preferences(12)]


def test_rows_with_equal_answers_are_left_out_and_counted(train, tmp_path, capsys, output):
    rows = make_preferences(24)
    for row in rows[:5]:
        row["rejected"] = row["chosen"]
    rows[5]["prompt"] = " ".join(["red"] * 24)
    data = write_two_splits(tmp_path / "rows", rows)
    assert train("--data.path", data, "--training.max_steps", 1) == 0
    told = "6 of 24 {} rows were left out: within data.max_length=48 tokens their 'chosen' is equal"
    err = capsys.readouterr().err
    assert missing(err, told.format("training"), told.format("validation")) == []
    assert facts(output)["rows"] == {"train": 18, "validation": 18}


ASKED, SAID = ([{"role": role, "content": "red"}] for role in ("user", "assistant"))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            texts(rejected="red", chosen="red"),
            "but all 12 were left out: | 'chosen' is equal to 'rejected'",
        ),
        (texts(chosen=" "), "column 'chosen' must hold an answer to learn in at least one row"),
        (texts(rejected=None), "column 'rejected' must hold a text in every row, but 12 of 12"),
        (
            [{"prompt": "red", "chosen": "cat"}],
            "`task: dpo` names the column 'rejected' | are prompt, chosen.",
        ),
        (
            [{"prompt": "red", "chosen": SAID, "rejected": SAID}],
            "column 'prompt' must hold a list of messages",
        ),
        (
            [{"prompt": ASKED, "chosen": SAID, "rejected": [{"role": "assistant"}]}],
            "column 'rejected' must hold a list of messages | 1 of 1 rows",
        ),
    ],
    ids=["equal", "empty", "null", "missing", "a prompt without a turn", "no content"],
)
def test_faulty_rows_are_told(error, tmp_path, rows, told):
    data = write_two_splits(tmp_path / "rows", rows)
    assert missing(error("--data.path", data), told) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("method=full", "`method` must be dynamic or lora with `task: dpo`, but got full"),
        ("method=adalora", "`method` must be dynamic or lora with `task: dpo`"),
        ("method=lora --lora.init_lora_weights=pissa", "`lora.init_lora_weights` | got pissa"),
        ("lora.lora_dropout=0.1", "`lora.lora_dropout` must be 0 with `task: dpo`"),
        ("lora.target_modules=[lm_head]", "leave out | lm_head | modules_to_save"),
        ("training.dpo_beta=0", "`training.dpo_beta` | > 0"),
        ("training.neftune_noise_alpha=5", "null with `task: dpo`"),
        ("data.completion=chosen", "`data.prompt` and `data.completion` | only"),
    ],
)
def test_settings_that_do_not_fit_are_told(error, options, told):
    assert missing(error(*f"--{options}".split()), told) == []
