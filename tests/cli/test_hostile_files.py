"""Nothing that a run loads can run code: a pickle in place of any of its files stays a file."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynlora.cli.main import main
from dynlora.files.json_files import read_json, write_json
from dynlora.runs.checkpoints import SEAL, manifest_of

CHECKPOINT = Path("checkpoints/checkpoint-10")
READ = (
    *(
        f"{CHECKPOINT}/{name}"
        for name in (
            "adapter_model.safetensors", "dynlora.json", "dynlora.safetensors", "job.json",
            "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
        )
    ),
    "config.yaml", "run.json", "metrics.jsonl",
)  # fmt: skip
NAMES = ("adapter_config.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json")
NOT_READ = (*(f"{CHECKPOINT}/{name}" for name in NAMES), "ranks.jsonl")
"""Files that a resumed run does not need, or writes again from the values in `dynlora.json`."""


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def plant(path, marker):
    """Put a pickle in the place of a file, and seal the checkpoint again: an attacker can."""
    content = pickle.dumps(Payload(marker), protocol=2)  # what torch expects
    pickle.loads(content)
    assert marker.exists()  # it works where it is let
    marker.unlink()
    path.write_bytes(content)
    if path.parent.name == CHECKPOINT.name and path.name != SEAL:
        seal(path.parent)


def seal(checkpoint):
    """Make a checkpoint's manifest that of the files which are there now."""
    progress = checkpoint / SEAL
    values = read_json(progress)
    progress.unlink()
    write_json(progress, {**values, "files": manifest_of(checkpoint)})


@pytest.fixture
def run(finished, output):
    return shutil.copytree(finished, output)


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize(
    "names", [NOT_READ, *((name,) for name in READ)], ids=lambda names: Path(names[0]).name
)
def test_a_resumed_run_runs_no_code_out_of_its_files(train, run, tmp_path, names, capsys):
    marker = tmp_path / "code was run"
    for name in names:
        assert (run / name).is_file()
        plant(run / name, marker)
    code = train("--training.resume", run / CHECKPOINT)
    assert not marker.exists()
    assert code == (0 if names == NOT_READ else 2), capsys.readouterr().err


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_runs_no_code_out_of_its_files(run, tmp_path, name):
    marker = tmp_path / "code was run"
    plant(run / "adapter" / name, marker)
    adapter, made = run / "adapter", tmp_path / "made"
    for words in (
        ["eval", run], ["inspect", adapter], ["diff", adapter, adapter],
        ["combine", adapter, adapter, "--output", made],
    ):  # fmt: skip
        assert main([str(word) for word in words]) == 2
        assert not marker.exists()


def test_tensors_of_another_run_are_refused_before_anything_is_written(error, run):
    tensors = load_file(run / CHECKPOINT / "dynlora.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(zeros, run / CHECKPOINT / "dynlora.safetensors")
    seal(run / CHECKPOINT)
    line = error("--training.resume", run / CHECKPOINT)
    assert "dynlora.json" in line
    assert "not as they were written together" in line
