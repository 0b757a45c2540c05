"""Give each engine the forms of the adapter that it reads; run its job and its documented code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engines.documented import python_blocks, run_block
from benchmarks.engines.gguf_files import write_lora_gguf
from benchmarks.engines.variants import read_config
from dynlora.cli.main import main as dynlora

HERE = Path(__file__).parent
WIDE = 256
"""A `max_lora_rank` that fits any adapter at hand."""
Made = tuple[dict[str, Any], str]
"""Result of an engine's job, and the output of the documented code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Inputs of every engine."""

    work: Path  # for intermediate files
    base: Path  # folder of the base model; its GGUF is beside it
    adapters: Mapping[str, Path]  # by form; `uniform` is the trained one in the engine's format
    prompts: list[list[int]]
    expected: list[list[int]]  # PEFT's continuations with the adapter
    new_tokens: int


def serve_vllm(setting: Setting) -> Made:
    served = {"MODEL": setting.base, "served": setting.adapters["uniform"]}
    wide = _generate("vllm", setting.base, {}, setting, rank=WIDE)
    made = _generate("vllm", setting.base, setting.adapters, setting)
    made["measured"]["bytes_per_adapter_slot"] |= wide["measured"]["bytes_per_adapter_slot"]
    return made, _block("vllm", served, setting)


def serve_llamacpp(setting: Setting) -> Made:
    base = setting.work / "base.gguf"
    files = {form: setting.work / f"{form}.gguf" for form in setting.adapters}
    for form, file in files.items():
        write_lora_gguf(setting.adapters[form], setting.base, file)
    served = {"base.gguf": base, "served.gguf": files["uniform"]}
    return _generate("llamacpp", base, files, setting), _block("llamacpp", served, setting)


def serve_mlx(setting: Setting) -> Made:
    folders = {form: _export(form, "mlx", setting) for form in ("uniform", "doubled")}
    served = {"MODEL": setting.base, "served": folders["uniform"]}
    return _generate("mlx", setting.base, folders, setting), _block("mlx", served, setting)


def serve_onnx(setting: Setting) -> Made:
    folders = {form: _export(form, "onnx", setting) for form in ("uniform", "doubled")}
    printed = _block("onnx", {"served": folders["uniform"]}, setting)  # writes int8.onnx too
    files = {form: folder / "model.onnx" for form, folder in folders.items()}
    files["int8"] = folders["uniform"] / "int8.onnx"
    files["switched"] = _export("uniform", "onnx-lora", setting) / "model.onnx"
    return _read("onnx", files, setting), printed


def serve_executorch(setting: Setting) -> Made:
    files = {form: setting.work / f"{form}.pte" for form in ("uniform", "doubled")}
    for form, file in files.items():
        _script("executorch", "lower", _export(form, "merged", setting), file)
    return _read("executorch", files, setting), ""


ENGINES: dict[str, Callable[[Setting], Made]] = {
    "vllm": serve_vllm,
    "llamacpp": serve_llamacpp,
    "mlx": serve_mlx,
    "onnx": serve_onnx,
    "executorch": serve_executorch,
}


def export(adapter: Path, form: str, output: Path) -> Path:
    """Return the output folder of `dynlora export`, which is replaced."""
    shutil.rmtree(output, ignore_errors=True)
    status = dynlora(["export", str(adapter), "--format", form, "--output", str(output)])
    if status:
        sys.exit(status)
    return output


def _export(form: str, target: str, setting: Setting) -> Path:
    """Return a form of the adapter in an engine's format; `uniform` from the adapter as trained."""
    source = setting.adapters["native" if form == "uniform" else form]
    return export(source, target, setting.work / f"{target}-{form}")


def _generate(
    engine: str,
    model: Path,
    adapters: Mapping[str, Path],
    setting: Setting,
    rank: int | None = None,
) -> dict[str, Any]:
    """Return continuations by an engine with adapters, and without any as the form `none`.

    The engine makes room for `rank`, by default for that of the uniform adapter.
    """
    job = {
        "model": str(model),
        "adapters": {"none": None} | {form: str(path) for form, path in adapters.items()},
        "prompts": setting.prompts,
        "new_tokens": setting.new_tokens,
        "rank": rank or read_config(setting.adapters["uniform"])["r"],
    }
    return _run(engine, job, setting)


def _read(engine: str, files: Mapping[str, Path], setting: Setting) -> dict[str, Any]:
    """Return continuations of whole models that read a text at once."""
    job = {
        "files": {form: str(file) for form, file in files.items()},
        "prompts": setting.prompts,
        "expected": setting.expected,
    }
    return _run(engine, job, setting)


def _python(engine: str) -> Path:
    """Return the interpreter of an engine's environment; ONNX Runtime is in this one."""
    return Path(sys.executable if engine == "onnx" else f".venv-{engine}/bin/python")


def _block(engine: str, files: dict[str, Path], setting: Setting) -> str:
    return run_block(python_blocks()[engine], _python(engine), setting.work / "documented", files)


def _run(engine: str, job: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Return the result of a job in an engine, with its own process and environment."""
    files = setting.work / f"{engine}-job.json", setting.work / f"{engine}.json"
    files[0].write_text(json.dumps(job))
    _script(engine, "engine", *files)
    return json.loads(files[1].read_text())


def _script(engine: str, name: str, *files: Path) -> None:
    """Run a script of this folder in an engine's environment."""
    # Nothing of this process's Python may leak into the other one's.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = HERE / f"{name}_{engine}.py"
    subprocess.run([_python(engine), script, *files], check=True, env=environment)
