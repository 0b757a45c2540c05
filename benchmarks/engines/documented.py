"""Run the Python blocks of docs/serving.md, each in its engine's environment.

Links under the file names of the document lead to the files of this check.
"""

import os
import re
import subprocess
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
PACKAGES = {"vllm": "vllm", "llamacpp": "xllamacpp", "mlx": "mlx_lm", "onnx": "onnxruntime"}
"""The package that an engine's block imports."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # as the document says
    "VLLM_LOGGING_LEVEL": "ERROR",  # vLLM's log would stand between what the block prints
}


def python_blocks() -> dict[str, str]:
    """Return the Python blocks of the document by the engine that they import."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return {
        engine: block
        for engine, package in PACKAGES.items()
        for block in blocks
        if re.search(rf"^(import|from) {package}\b", block, re.MULTILINE)
    }


def run_block(code: str, python: Path, folder: Path, files: dict[str, Path]) -> str:
    """Return what a block prints.

    Args:
        code: The block.
        python: The interpreter of its engine's environment.
        folder: A folder for the links; the block runs there.
        files: What each name in the block stands for.

    Raises:
        CalledProcessError: If the block fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.resolve())
    # vLLM starts processes that import the script again, hence the guard.
    script = folder / "block.py"
    guarded = "".join(f"    {line}\n" for line in code.splitlines())
    script.write_text(f'if __name__ == "__main__":\n{guarded}')
    # Nothing of this process's Python may leak into the other one's.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= ENVIRONMENT
    done = subprocess.run(
        [python.absolute(), script.name],
        check=True,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip()
