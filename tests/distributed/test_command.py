"""`dynlora train` in two processes: one run, equal to that of one process with the same batches."""

import json
import os
import re
import signal
import sys

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from dynlora.cli.main import main
from dynlora.errors import EngineError, NonFiniteError
from dynlora.fused import layers as fused
from dynlora.importance.agreement import AgreementTest
from dynlora.runs.checkpoints import finish_command
from dynlora.train import processes
from dynlora.train.callbacks import Stopping
from dynlora.train.sharded import check_sharding
from tests.cli.finished import assert_same_end, facts, losses, read_json, weights
from tests.distributed.cpus_as_gpus import take_cpus_for_gpus
from tests.distributed.launch import NEEDS_DEEPSPEED, fork_group
from tests.jobs import job_values, parse_job, save_model, write_data, write_job
from tests.language import language_job, save_language_model, write_pairs
from tests.processes import run_in_fork, run_in_group

ROWS = {"train": 24, "validation": 5}
"""The validation rows fill neither the last batch nor those of both processes."""
BATCH, HALF = "--training.batch_size=8", "--training.batch_size=4"
DROPOUT = ("--lora.lora_dropout=0.5",)
PREFERRED = ("--task=dpo", "--data.prompt=ask", "--data.completion=null")
BEST = (
    "--method=full", "--training.epochs=4", "--training.save=epoch",
    "--training.learning_rate=1e-3", "--training.early_stopping_patience=1",
    "--training.load_best_model_at_end=true",
)  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return a job of a classifier without dropout, of 6 steps of 8 rows."""
    folder = tmp_path_factory.mktemp("classifier")
    model = save_model(folder / "model")
    config = read_json(model / "config.json")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config | still))
    values = job_values(model, write_data(folder / "data", **ROWS), folder / "run")
    values["training"] |= {"eval_batch_size": 2, "save_steps": 2}
    return write_job(folder / "job.yaml", values)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Return a job of a causal language model."""
    folder = tmp_path_factory.mktemp("language")
    data = write_pairs(folder / "data", **ROWS)
    values = language_job(save_language_model(folder / "model"), data, folder / "run")
    values["training"] |= {"eval_batch_size": 2, "max_steps": 2, "save": "no"}
    return write_job(folder / "job.yaml", values)


def train(job, output, *options):
    return main(["train", str(job), "--output", str(output), *options])


def train_moving(job, output, *options):
    """Let ranks move and layers be fused, as in the tests' process."""
    AgreementTest.is_significant = lambda self: True
    fused.LEAST_ELEMENTS = 0
    return train(job, output, *options)


def train_and_end(job, output, step, end, *options):
    """Train, and call a function in the second process within a step."""

    def maybe(self, args, state, control, **more):
        if os.environ["RANK"] == "1" and state.global_step == step - 1:
            end()

    Stopping.on_step_begin = maybe
    return train_moving(job, output, *options)


def train_sharded(engine, job, *given):
    """Train as under `accelerate launch` with the example of an engine, but in float32."""
    file = f"examples/cluster/{'fsdp2' if engine == 'fsdp2' else 'zero3'}.yaml"
    words = ["--config_file", file, "--mixed_precision", "no", "--num_processes", "2"]
    # Accelerate shards the embeddings alone, which fails within a sharded block, as BERT has one.
    block = "BertLayer" if "classifier" in str(job) else "LlamaDecoderLayer"
    words += ["--fsdp_transformer_layer_cls_to_wrap", block, "train"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    if engine == "fsdp2":
        found = prepare_multi_gpu_env(options)
    else:
        options.zero_stage = int(engine[-1])
        options.deepspeed_fields_from_accelerate_config = ""
        _, found = prepare_deepspeed_cmd_env(options)
    names = ("ACCELERATE_", "FSDP_")
    os.environ |= {name: value for name, value in found.items() if name.startswith(names)}
    take_cpus_for_gpus()
    return train_and_end(job, *given)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def lose_launcher():
    os.getppid = lambda: 1


def fail():
    raise NonFiniteError("the loss must be finite, got nan in the second process")


def files(run):
    """Return the names of a run's files, with one for the random state of all processes."""
    names = {str(path.relative_to(run)) for path in run.rglob("*")}
    return {re.sub(r"rng_state(_\d)?", "rng_state", name) for name in names}


def trained(run):
    """Return a run's weights without the biases of keys, whose gradients are rounding errors."""
    return {name: value for name, value in weights(run).items() if "key.bias" not in name}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("made", "options"),
    [("job", ()), ("job", BEST), ("language", ("--method=lora",)), ("language", PREFERRED)],
    ids=["dynamic", "full", "causal_lm", "dpo"],
)
def test_two_processes_write_the_run_of_one_with_the_same_rows_per_step(
    request, tmp_path, monkeypatch, made, options
):
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)
    job, one, two = request.getfixturevalue(made), tmp_path / "one", tmp_path / "two"
    assert train(job, one, *options, BATCH, "--quiet") == 0
    codes, said = fork_group(train_moving, job, two, *options, HALF, "--json")
    assert codes == [0, 0], said
    assert said.count("of 8 rows on 2 processes") == 1
    assert len(re.findall("^{", said, re.MULTILINE)) == 1
    ours, theirs = facts(one), facts(two)
    assert ours.keys() == theirs.keys()
    assert (ours["processes"], theirs["processes"]) == (1, 2)
    for key in ("steps", "budget", "parameters", "final_ranks"):
        assert theirs[key] == ours[key], key
    for key in ("metrics_before", "metrics_after"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-6), key
    assert dict(losses(two)) == pytest.approx(dict(losses(one)), abs=1e-5)
    torch.testing.assert_close(trained(two), trained(one), rtol=0, atol=1e-5)
    assert files(two) == files(one)
    if made == "job" and not options:
        assert len(set(theirs["final_ranks"].values())) > 1


@pytest.mark.timeout(900)
def test_a_run_that_lost_a_process_or_its_launcher_resumes_to_the_same_bits(job, tmp_path, capsys):
    whole, run = tmp_path / "whole", tmp_path / "run"
    resume = (HALF, *DROPOUT, "--training.resume=latest")
    assert fork_group(train_moving, job, whole, HALF, *DROPOUT)[0] == [0, 0]
    codes, said = fork_group(train_and_end, job, run, 4, kill, HALF, *DROPOUT)
    assert codes == [2, -signal.SIGKILL], said
    assert said.count("error: ") == 1
    assert "one was killed or lost its connection" in facts(run)["error"]
    assert f"go on with `{finish_command(run, 'dynamic', 2)}`" in said
    codes, said = fork_group(train_and_end, job, run, 5, lose_launcher, *resume)
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert said.count("interrupted: after 5 of 6 steps; go on with `") == 1
    assert facts(run)["status"] == "interrupted"
    assert train(job, run, *resume) == 2
    assert "`processes` of" in capsys.readouterr().err
    codes, said = fork_group(train_moving, job, run, *resume)
    assert codes == [0, 0], said
    assert_same_end(whole, run)


SAVED_BEST = ("--training.load_best_model_at_end=true", "--training.save=epoch")
ZERO = [pytest.param(f"zero{n}", marks=NEEDS_DEEPSPEED) for n in (1, 2, 3)]
SHARDED = ["fsdp2", *ZERO[1:]]


def assert_same_run(whole, plain):
    """Assert that two runs differ by rounding errors only, and in the files of checkpoints."""
    ours, theirs = facts(plain), facts(whole)
    assert ours.keys() == theirs.keys()
    for key in ("steps", "budget", "parameters", "final_ranks"):
        assert theirs[key] == ours[key], key
    for key in ("metrics_before", "metrics_after"):
        assert theirs[key] == pytest.approx(ours[key], abs=1e-5), key
    assert dict(losses(whole)) == pytest.approx(dict(losses(plain)), abs=1e-5)
    best = [str(run["best_checkpoint"]).rpartition("/")[2] for run in (ours, theirs)]
    assert best[0] == best[1]
    torch.testing.assert_close(trained(whole), trained(plain), rtol=0, atol=1e-5)
    named = [{name for name in files(run) if "checkpoint-" not in name} for run in (whole, plain)]
    assert named[0] == named[1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["fsdp2", *ZERO])
def test_a_run_under_accelerate_is_that_of_whole_models_also_once_resumed(
    job, engine, tmp_path, monkeypatch, capsys
):
    plain, whole, run = tmp_path / "plain", tmp_path / "whole", tmp_path / "run"
    resume = (HALF, "--training.resume=latest")
    codes, said = fork_group(train_moving, job, plain, HALF)
    assert codes == [0, 0], said
    codes, said = fork_group(train_sharded, engine, job, whole, 0, kill, HALF)
    assert codes == [0, 0], said
    assert_same_run(whole, plain)

    codes, said = fork_group(train_sharded, engine, job, run, 4, kill, HALF)
    assert codes == [2, -signal.SIGKILL], said
    name = facts(run)["engine"]
    assert f"go on with `{finish_command(run, 'dynamic', 2, name)}`" in said
    monkeypatch.setattr("dynlora.train.build.process_count", lambda: 2)
    assert train(job, run, *resume) == 2
    assert re.search(f"`engine` of .* is {name} and now None", capsys.readouterr().err)
    codes, said = fork_group(train_sharded, engine, job, run, 0, kill, *resume)
    assert codes == [0, 0], said
    assert_same_end(whole, run)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", SHARDED)
@pytest.mark.parametrize(
    ("made", "options"),
    [("job", BEST), ("job", (*BEST, "--method=lora")), ("language", ()), ("language", PREFERRED)],
    ids=["full", "lora", "causal_lm", "dpo"],
)
def test_other_runs_under_accelerate_are_those_of_whole_models(
    request, made, options, engine, tmp_path
):
    job, plain, whole = request.getfixturevalue(made), tmp_path / "plain", tmp_path / "whole"
    codes, said = fork_group(train_moving, job, plain, *options, HALF)
    assert codes == [0, 0], said
    codes, said = fork_group(train_sharded, engine, job, whole, 0, kill, *options, HALF)
    assert codes == [0, 0], said
    assert_same_run(whole, plain)


def test_a_process_that_fails_ends_all_with_its_own_message(job, tmp_path):
    codes, said = fork_group(train_and_end, job, tmp_path / "run", 3, fail, HALF)
    assert codes == [128 + signal.SIGTERM, 2], said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert line == "error: the loss must be finite, got nan in the second process"
    assert "Traceback" not in said
    assert line.removeprefix("error: ") in facts(tmp_path / "run")["error"]


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ("`lora.r` must be", ("--lora.r=0",)),
        ("nowhere", ("--data.path=nowhere",)),
        ("`--processes` must be left out under torchrun", ("--processes=2",)),
    ],
)
def test_wrong_input_is_told_once_and_nothing_is_written(job, tmp_path, told, options):
    codes, said = fork_group(train, job, tmp_path / "run", *options)
    assert 2 in codes, said
    assert set(codes) <= {2, 128 + signal.SIGTERM}
    assert said.count("error: ") == said.count(told) == 1, said
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(EngineError, match="got 3 processes and 2 on this machine: start at most 2"):
        processes.join_group()


@pytest.mark.parametrize(
    ("engine", "version", "options", "told"),
    [
        ("FSDP", "1", (), "must be of FSDP2, got FSDP1"),
        ("FSDP", "2", ("--method=adalora",), "FSDP2 must not have method: adalora"),
        ("FSDP", "2", ("--lora.init_lora_weights=eva",), "init_lora_weights: eva"),
        ("DEEPSPEED", "", ("--training.loraplus_lr_ratio=4",), "DeepSpeed .* training.loraplus"),
        ("DEEPSPEED", "", SAVED_BEST, "not have training.load_best_model_at_end"),
    ],
)
def test_settings_that_a_sharded_model_cannot_have_are_refused(
    job, monkeypatch, engine, version, options, told
):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(EngineError, match=told):
        check_sharding(parse_job(job, *options))


def test_an_interrupt_before_torch_is_loaded_is_told_by_the_first_process_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in processes.VARIABLES:
        monkeypatch.setenv(name, "0")
    assert processes.announce_failure(KeyboardInterrupt()) is None
    monkeypatch.setenv("RANK", "1")
    assert processes.announce_failure(KeyboardInterrupt()) == "stopped"


# The processes of `--processes`, as programs of a line.

RANK = "import os, signal, sys, time; rank = os.environ['RANK']; "


def launch_lines(line):
    processes.SECONDS = 0.2
    try:
        return processes.launch([sys.executable, "-c", RANK + line], 2, lambda: "start again")
    except EngineError as error:
        print(error)
        return 2


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(3 if rank == '1' else 128 + 15)", 3, ""),
        ("time.sleep(60) if rank == '0' else sys.exit(3)", 3, ""),
        ("os.kill(os.getpid(), 9) if rank == '1' else sys.exit(128 + 15)", 2, "process 1 of 2"),
        (
            "signal.signal(15, lambda *_: sys.exit(5)); "
            "rank == '1' and os.kill(os.getppid(), 15); time.sleep(60)",
            5, "",
        ),
        (
            "signal.signal(15, lambda *_: os.kill(os.getpid(), 9)); "
            "rank == '1' and os.kill(os.getppid(), 15); time.sleep(60)",
            128 + 15, "",
        ),
    ],
    ids=["all end", "one fails", "one hangs", "one is killed", "all stop", "all crash"],
)  # fmt: skip
def test_processes_end_with_the_exit_code_of_the_first_to_fail(line, code, told):
    done = run_in_fork(launch_lines, line, timeout=30)
    assert done.returncode == code, done.stderr
    assert told in done.stderr


def test_the_option_processes_starts_them_and_prints_one_result(job, tmp_path):
    options = ("--method=lora", "--training.max_steps=2", "--training.save=no", HALF)
    command = [sys.executable, "-m", "dynlora", "train", job, "--processes", "2", "--json"]
    done = run_in_group(
        [*command, f"--output={tmp_path / 'run'}", *options],
        capture_output=True, text=True, env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["after"] == facts(tmp_path / "run")["metrics_after"]
    assert done.stderr.count("2 steps of 8 rows on 2 processes") == 1
