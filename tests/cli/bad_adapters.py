"""Adapters that no verb takes: how to break a good one, and what the error must tell."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
LONG = "x" * 1_000_000
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


def configure(folder: Path, **values: object) -> None:
    """Change the configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def weigh(folder: Path, change) -> None:
    """Change the tensors, given by name."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)


def cut_short(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"not even a pickle: it must not be opened")


def set_tensor(name: str, value) -> object:
    def change(tensors: dict) -> None:
        tensors[name] = value(tensors[name]) if callable(value) else value

    return lambda folder: weigh(folder, change)


def without(name: str) -> object:
    return lambda folder: weigh(folder, lambda tensors: tensors.pop(name))


def not_finite(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), 1])
    return changed


BROKEN = {
    "no folder": (lambda f: (f / "adapter_config.json").unlink(), ["adapter_config.json"]),
    "no json": (lambda f: (f / "adapter_config.json").write_text("{"), ["must be JSON"]),
    "no object": (lambda f: (f / "adapter_config.json").write_text("[]"), ["a list"]),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), [WEIGHTS, "got none"]),
    "a pickle": (pickled, ["adapter_model.bin, a pickle", "safetensors"]),
    "cut short": (cut_short, ["whole safetensors file", "bytes", "cut short"]),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), ["whole safetensors file", "0 bytes"]),
    "another method": (lambda f: configure(f, peft_type="LOHA"), ["LORA", "'LOHA'"]),
    "DoRA": (lambda f: configure(f, use_dora=True), ["DoRA", "`use_dora`"]),
    "PiSSA": (lambda f: configure(f, init_lora_weights="pissa"), ["'pissa'", "changes it"]),
    "no rank": (lambda f: configure(f, r=0), ["`r`", "at least 1", "got 0"]),
    "no alpha": (lambda f: configure(f, lora_alpha="8"), ["`lora_alpha`", "got '8'"]),
    "no pattern": (lambda f: configure(f, rank_pattern={"(": 4}), ["`rank_pattern`", "'('"]),
    "no end": (lambda f: configure(f, rank_pattern={"(.|.)*[^a-z]": 4}), ["`rank_pattern`"]),
    "too large": (lambda f: configure(f, lora_alpha=1e39), ["`lora_alpha`", "float32 holds"]),
    "too many digits": (lambda f: configure(f, r=10**400), ["whole number beyond"]),
    "too deep": (lambda f: (f / "adapter_config.json").write_text("[" * 9999), ["64 levels"]),
    "another rank": (lambda f: configure(f, r=5), ["layer.0", "gives it, 5", "(4, 16)"]),
    "a missing half": (without(f"{QUERY}.lora_B.weight"), ["self.query'", "no lora_B"]),
    "shapes": (
        set_tensor(f"{QUERY}.lora_B.weight", torch.zeros(16, 3)),
        ["self.query'", "(4, 16)", "(16, 3)"],
    ),
    "an axis": (set_tensor(f"{QUERY}.lora_A.weight", torch.zeros(4)), ["query", "(4,)"]),
    "numbers": (
        set_tensor(f"{QUERY}.lora_A.weight", torch.zeros(4, 16, dtype=torch.int8)),
        ["floating point", "int8"],
    ),
    "not finite": (
        set_tensor(f"{QUERY}.lora_A.weight", not_finite),
        ["must be finite", "got 2 of 64", "query"],
    ),
    "a magnitude": (
        lambda f: weigh(f, lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(16)})),
        ["lora_magnitude_vector"],
    ),
    "a long tensor name": (
        set_tensor(f"{LONG}.lora_A.weight", torch.zeros(4, 16)),
        ["tensor's name", "at most 2000 characters", "got one of 1000014"],
    ),
    "a long base model": (
        lambda f: configure(f, base_model_name_or_path=LONG),
        ["`base_model_name_or_path`", "at most 2000 characters", "got 1000000"],
    ),
    "a long method": (lambda f: configure(f, peft_type=LONG), ["LORA", "is not LoRA"]),
    "a long text for patterns": (
        lambda f: configure(f, rank_pattern=LONG),
        ["`rank_pattern` must map names to numbers"],
    ),
    "a long pattern": (lambda f: configure(f, rank_pattern={LONG: 0}), ["rank_pattern"]),
    "no layer": (
        lambda f: weigh(f, lambda t: [t.pop(key) for key in list(t) if "lora_" in key]),
        ["got none of them"],
    ),
}
"""By name, what breaks the folder of an adapter, and parts of the error."""
