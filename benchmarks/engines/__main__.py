"""Serve a dynamic adapter with real engines and compare with PEFT, token by token.

    make engines DATA=FOLDER

Trains a dynamic-rank adapter of SmolLM2-135M on E2E NLG (FOLDER contains its parquet files) and
exports it with `--format uniform`. PEFT, vLLM and llama.cpp then continue the same 20 prompts
greedily in float32. The check fails unless the uniform adapter agrees with PEFT on at least 19 of
20 prompts in each engine, and the deliberately broken adapters do not. Engines run one after
another, each in its own environment (.venv-vllm, .venv-llamacpp).

Intermediate files stay in the work folder; an existing adapter there is not trained again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.engines.base_model import save_base
from benchmarks.engines.compare import compare
from benchmarks.engines.documented import python_blocks, run_block
from benchmarks.engines.gguf_files import write_lora_gguf
from benchmarks.engines.reference import choose_prompts, continue_greedily
from benchmarks.engines.train_adapter import train_adapter
from benchmarks.engines.variants import BREAKS, make_variants, read_config
from dynlora.cli.main import main as dynlora

HERE = Path(__file__).parent
PROMPTS = 20
NEW_TOKENS = 48


def main() -> None:
    """Run every step and write the result; exit with 1 if an engine does not agree."""
    options = _options()
    work: Path = options.work
    base, native = work / "base", work / "adapter"
    if not (work / "training.json").is_file():
        save_base(base, work / "base.gguf")
        training = train_adapter(base, options.data, native, steps=options.steps)
        (work / "training.json").write_text(json.dumps(training))
    adapters = make_variants(native, _export(native, work / "uniform"), work)
    prompts = choose_prompts(base, options.data, count=PROMPTS)
    reference = {
        "base": continue_greedily(base, None, prompts, new_tokens=NEW_TOKENS),
        "adapter": continue_greedily(base, native, prompts, new_tokens=NEW_TOKENS),
    }
    (work / "peft.json").write_text(json.dumps(reference))
    engines, printed = _serve(adapters, prompts, options)
    result = {
        "training": json.loads((work / "training.json").read_text()),
        "uniform_rank": read_config(adapters["uniform"])["r"],
        "bytes": {name: _weights(adapters[name]).stat().st_size for name in ("native", "uniform")},
        "prompts": PROMPTS,
        "new_tokens": NEW_TOKENS,
        "peft_with_and_without_adapter": compare(reference["adapter"], reference["base"])["equal"],
        "versions": {name: version(name) for name in ("peft", "transformers", "torch", "gguf")},
        "engines": {name: _judge(reference, made) for name, made in engines.items()},
        "printed_by_the_documents": printed,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not all(engine["passed"] for engine in result["engines"].values()):
        sys.exit("An engine does not agree with PEFT, or a broken adapter went unnoticed.")


def _serve(
    adapters: dict[str, Path], prompts: list[list[int]], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each engine's continuations, and the output of the documented code."""
    work: Path = options.work
    base, base_gguf = work / "base", work / "base.gguf"
    models = {"vllm": base, "llamacpp": base_gguf}
    pythons = {"vllm": options.vllm, "llamacpp": options.llamacpp}
    forms = {"vllm": adapters, "llamacpp": _ggufs(adapters, base, work)}
    documented = {
        "vllm": {"MODEL": base, "served": adapters["uniform"]},
        "llamacpp": {"base.gguf": base_gguf, "served.gguf": forms["llamacpp"]["uniform"]},
    }
    common = {
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "rank": read_config(adapters["uniform"])["r"],
    }
    made, printed = {}, {}
    for name, code in python_blocks().items():
        paths = {form: str(path) for form, path in forms[name].items()}
        job = {"model": str(models[name]), "adapters": {"none": None, **paths}, **common}
        made[name] = _run(name, pythons[name], job, work)
        printed[name] = run_block(code, pythons[name], work / "documented", documented[name])
    return made, printed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of E2E NLG's parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/engines"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--llamacpp", type=Path, default=Path(".venv-llamacpp/bin/python"))
    parser.add_argument("--steps", type=int, default=100)
    return parser.parse_args()


def _export(native: Path, uniform: Path) -> Path:
    """Return the uniform adapter, exported by the command line."""
    shutil.rmtree(uniform, ignore_errors=True)
    status = dynlora(["export", str(native), "--format", "uniform", "--output", str(uniform)])
    if status:
        sys.exit(status)
    return uniform


def _ggufs(adapters: dict[str, Path], base: Path, work: Path) -> dict[str, Path]:
    """Return each adapter as a GGUF beside its folder."""
    files = {name: work / f"{name}.gguf" for name in adapters}
    for name, file in files.items():
        write_lora_gguf(adapters[name], base, file)
    return files


def _weights(adapter: Path) -> Path:
    return adapter / "adapter_model.safetensors"


def _run(name: str, python: Path, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Return the result of a job in an engine, with its own process and environment."""
    files = work / f"{name}-job.json", work / f"{name}.json"
    files[0].write_text(json.dumps(job))
    # Nothing of this process's Python may leak into the other one's.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = HERE / f"engine_{name}.py"
    subprocess.run([python, script, *files], check=True, env=environment)
    return json.loads(files[1].read_text())


def _judge(reference: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """Return an engine's agreement with PEFT for each form of the adapter, and the verdict."""
    forms = {
        name: compare(reference["adapter"], continuations)
        for name, continuations in made["continuations"].items()
    }
    base = compare(reference["base"], made["continuations"]["none"])
    broken = [forms[name]["passed"] for name in (*BREAKS, "none")]
    return {
        "versions": made["versions"],
        "passed": forms["uniform"]["passed"] and not any(broken),
        "base_model_alone": base,
        **forms,
    }


if __name__ == "__main__":
    main()
