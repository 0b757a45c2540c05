"""The files of `examples/cluster`: Accelerate reads them, and the script runs here."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.distributed.launch import NEEDS_DEEPSPEED
from tests.jobs import WORDS, save_tokenizer
from tests.processes import run_in_group

FOLDER = Path("examples/cluster")
SCRIPT = str(FOLDER / "train.py")
ACCELERATE = ["accelerate.commands.launch", "--mixed_precision=no"]
CONFIGS = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration_and_knows_its_keys(path):
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    keys = {action.dest for action in launch_command_parser()._actions}
    given = yaml.safe_load(path.read_text())
    assert {*given.get("fsdp_config", {}), *given.get("deepspeed_config", {})} <= keys


def test_the_slurm_script_is_bash_and_names_files_that_exist():
    script = FOLDER / "train.slurm"
    run_in_group(["bash", "-n", str(script)], check=True)
    named = {word.strip("'\"") for word in script.read_text().split() if "examples/cluster" in word}
    assert {FOLDER / "several-nodes.yaml", FOLDER / "train.py"} <= {Path(name) for name in named}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_the_script_trains_in_one_process_and_saves_one_adapter(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("sys.argv", [SCRIPT, *options_of(model, tmp_path)])
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    check(model, tmp_path, capsys.readouterr().out)


def test_the_script_trains_in_two_processes_and_frees_the_model_before_it_leaves(model, tmp_path):
    """With torchrun, because `accelerate launch --cpu` starts one process per machine.

    A process that frees `DistributedDataParallel` last may wait forever at exit.
    """
    options = ["--standalone", "--nproc-per-node=2", "-m", "tests.distributed.freed_first"]
    printed = launch_script(model, tmp_path, ["torch.distributed.run", *options, SCRIPT])
    assert printed.count("process group destroyed after DistributedDataParallel") == 2


@NEEDS_DEEPSPEED
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_script_trains_under_deepspeed_and_saves_one_adapter(model, stage, tmp_path):
    config = yaml.safe_load((FOLDER / "zero3.yaml").read_text())
    if stage < 3:  # as the file tells
        config["deepspeed_config"]["zero_stage"] = stage
        del config["deepspeed_config"]["zero3_init_flag"]
    place = tmp_path / "config.yaml"
    place.write_text(yaml.safe_dump(config))
    launch_script(
        model,
        tmp_path,
        [
            *ACCELERATE,
            "--config_file",
            str(place),
            "--num_processes=2",
            "--main_process_port=0",
            "--module",
            "tests.distributed.zero_example",
            SCRIPT,
        ],
    )


def options_of(model, folder):
    """Return the script's options, and write the text that they name."""
    text = folder / "text"
    text.write_text("\n".join(" ".join(WORDS[k : k + 4]) for k in range(len(WORDS) - 4)) * 4)
    paths = ["--model", str(model), "--text", str(text), "--output", str(folder / "adapter")]
    return [*paths, "--steps=20", "--batch-size=2", "--rank=2", "--learning-rate=1e-2"]


def check(model, folder, printed):
    """Check what the script printed, and that the adapter loads."""
    assert printed.count("step 20: loss") == 1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "adapter")


def launch_script(model, folder, launcher):
    """Run the script by a launcher, and return the printed text."""
    command = [sys.executable, "-W", "ignore", "-m", *launcher, *options_of(model, folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    done = run_in_group(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    check(model, folder, done.stdout)
    return done.stdout
