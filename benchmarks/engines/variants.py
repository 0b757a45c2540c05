"""All forms of the adapter for the engines: native, uniform, and broken ones.

Two forms are wrong on purpose, so that the check can fail: the uniform adapter at twice and at half
its scale. Half is the result of a `lora_B` without the training's scaling of 2.
"""

import json
import shutil
from pathlib import Path

BREAKS = {"doubled": 2.0, "halved": 0.5}
"""Factor on the scale, by broken form."""


def make_variants(native: Path, uniform: Path, folder: Path) -> dict[str, Path]:
    """Return the folder of each form by its name; write the broken ones.

    Args:
        native: The adapter as trained.
        uniform: The same, exported with `--format uniform`.
        folder: Where the broken ones go.
    """
    broken = {name: folder / name for name in BREAKS}
    for name, target in broken.items():
        shutil.copytree(uniform, target, dirs_exist_ok=True)
        config = read_config(uniform)
        config["lora_alpha"] *= BREAKS[name]
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return {"native": native, "uniform": uniform, **broken}


def read_config(adapter: Path) -> dict:
    """Return an adapter's configuration."""
    return json.loads((adapter / "adapter_config.json").read_text())
