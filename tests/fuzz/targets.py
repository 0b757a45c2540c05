"""Files that verbs read: how to make a good one, which function reads it, how to change it."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from hypothesis import strategies as st
from peft.utils.warning import PeftWarning
from safetensors.torch import save_file

from tests.adapters import save_adapter
from tests.fuzz import rows
from tests.fuzz.mutations import mutated_json, mutated_lines, mutated_safetensors, mutated_yaml
from tests.harness.studies import TUNE, study_values
from tests.jobs import job_values
from tests.unit.report.runs import block_names, make_events, write_run

Files = st.SearchStrategy[bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file."""

    read: str
    """Name of a function of `reading`."""
    given: tuple[str, ...]
    """Its arguments, relative to the folder of good files."""
    change: Callable[[bytes], Files]
    """Returns a strategy of files like a good one."""
    more: tuple[object, ...] = ()
    """Further arguments."""

    def order(self, folder: Path) -> tuple[object, ...]:
        """Return the message to the process that reads the file."""
        return (self.read, *(str(folder / name) for name in self.given), *self.more)


def _json(good: bytes) -> Files:
    return mutated_json(json.loads(good))


def _config(good: bytes) -> Files:
    values = json.loads(good)
    return mutated_json({key: value for key, value in values.items() if value is not None})


def _lines(good: bytes) -> Files:
    return mutated_lines([json.loads(line) for line in good.splitlines()])


def _yaml(good: bytes) -> Files:
    return mutated_yaml(yaml.safe_load(good), good)


_RUN, _OTHER = ("run", "other"), ("other", "run")
TARGETS = {
    "adapter/adapter_config.json": Target("use_adapter", ("adapter",), _config),
    "adapter/adapter_model.safetensors": Target("use_adapter", ("adapter",), mutated_safetensors),
    "kohya.safetensors": Target("use_adapter", ("kohya.safetensors",), mutated_safetensors),
    "other/adapter/adapter_model.safetensors": Target("use_run", _OTHER, mutated_safetensors),
    "run/ranks.jsonl": Target("use_run", _RUN, _lines),
    "run/metrics.jsonl": Target("use_run", _RUN, _lines),
    "run/run.json": Target("use_run", _RUN, _json),
    "run/config.yaml": Target("use_run", _RUN, _yaml),
    "job.yaml": Target("read_job", ("job.yaml",), _yaml),
    "study.yaml": Target("read_study", ("study.yaml",), _yaml),
}
TARGETS |= {
    f"rows/{name}": Target("read_rows", (f"rows/{name}",), lambda _, files=files: files, (readers,))
    for name, (_, files, readers) in rows.FILES.items()
}
"""By path in the folder of good files."""


def make_files(folder: Path) -> Path:
    """Write a good file of every target into a folder, and return the folder."""
    lora = {"use_rslora": True, "modules_to_save": ["conv1"]}
    lora |= {"rank_pattern": {"head": 2}, "alpha_pattern": {"conv2": 3}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # peft 0.21 takes a bias for a sharded factor
        save_adapter(folder / "adapter", "bias", **lora)
    factors = {"lora_down.weight": torch.ones(2, 5), "lora_up.weight": torch.ones(3, 2)}
    factors |= {"alpha": torch.tensor([1.5])}
    kohya = {f"lora_unet_{n}.{end}": t.clone() for n in "ab" for end, t in factors.items()}
    save_file(kohya, folder / "kohya.safetensors", {"ss_network_dim": "2"})
    write_run(folder / "run", events=make_events(block_names(1), [10, 40, 70]))
    write_run(folder / "other")  # its ranks are known from its adapter alone
    save_adapter(folder / "other" / "adapter", "patterns")
    job = job_values(Path("model"), Path("rows"), Path("run"))
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    (folder / "study.yaml").write_text(yaml.safe_dump(study_values(tune=TUNE)))
    (folder / "rows").mkdir()
    for name, (good, _, _) in rows.FILES.items():
        (folder / "rows" / name).write_bytes(good)
    return folder
