"""Folders of models that must be refused: with code beside them, or files that lack weights."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def reconfigure(folder: Path, **values: Any) -> None:
    """Change values of a model's config.json and nothing else."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def put_code_beside(folder: Path, mark: Path) -> None:
    """Make a model one of an own type, whose code would write the file `mark` when it runs."""
    classes = ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoModelForCausalLM")
    named = dict.fromkeys(classes, "conf.Mine")
    reconfigure(folder, model_type="mine", auto_map=named)
    (folder / "conf.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            values = json.loads((folder / name).read_text())
            changed = {"auto_map": named, "tokenizer_class": "Mine", "image_processor_type": "Mine"}
            (folder / name).write_text(json.dumps(values | changed))


def drop_weights(folder: Path, *beginnings: str) -> None:
    """Remove the weights whose names begin so from a model's file."""
    path = folder / "model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if not k.startswith(beginnings)}
    save_file(kept, path, metadata={"format": "pt"})
