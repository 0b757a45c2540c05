"""Write a PEFT adapter as the folder that `mlx_lm.load(model, adapter_path=FOLDER)` reads.

MLX-LM computes ``scale * (x @ lora_a) @ lora_b``: the factors are the transposes of PEFT's, and all
layers have one rank and one scale.
"""

import json
import re
from pathlib import Path

from safetensors.torch import save_file

from dynlora.adapter_files.adapter import SavedAdapter, check_linear
from dynlora.adapter_files.checks import check_finite
from dynlora.adapter_files.formats import CONFIG
from dynlora.adapter_files.writer import new_folder
from dynlora.errors import AdapterError

WEIGHTS = "adapters.safetensors"
BLOCK = re.compile(r"^model\.layers\.\d+\.")  # MLX-LM names modules relative to their block


def write_mlx(adapter: SavedAdapter, output: Path) -> None:
    """Write a PEFT adapter from `uniform` to a new folder in MLX-LM's format.

    Raises `AdapterError` if MLX-LM cannot hold a tensor of the adapter or names its module
    otherwise, or `output` exists.
    """
    check_linear(adapter, "mlx")
    names = [layer.name for layer in adapter.layers]
    strange = next((n for n in names if n != "lm_head" and not BLOCK.match(n)), None)
    if strange is not None:  # MLX-LM would ignore it
        raise AdapterError(
            "`--format mlx` needs linear layers in blocks `model.layers.N`, as MLX-LM names them, "
            f"but got {strange} in {adapter.folder}. Use `--format merged`."
        )
    layout = {}
    for layer in adapter.layers:
        layout[f"{layer.name}.lora_a"] = layer.A.T.contiguous()
        layout[f"{layer.name}.lora_b"] = layer.B.T.contiguous()
    check_finite(layout, f"the result for {adapter.folder}", "scale its factors down")
    config = {
        "fine_tune_type": "lora",
        "num_layers": -1,  # all blocks; a layer without factors in the file changes nothing
        "lora_parameters": {
            "rank": adapter.layers[0].r,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({BLOCK.sub("", name) for name in names}),
        },
    }
    with new_folder(output) as draft:
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(layout, draft / WEIGHTS, {"format": "mlx"})
