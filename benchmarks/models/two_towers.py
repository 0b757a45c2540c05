"""Join an image encoder and a text encoder into one model for image-text retrieval.

    python -m benchmarks.models.two_towers --vision FOLDER --text FOLDER --out FOLDER

FOLDER is a Hugging Face folder, or for `--text` also `package/folder` inside an installed package.
The result is a `VisionTextDualEncoderModel` for jobs with `task: image_text_retrieval`, with the
image processor of one and the tokenizer of the other. Its two projections are random, so it
retrieves nothing before training.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)


def main(description: str | None, join: Callable[[str, str, Path], None]) -> None:
    """Join what the command line names: an image encoder's folder and a text model's."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--vision", required=True, help="folder of the image encoder")
    parser.add_argument("--text", required=True, help="folder of the text model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    join(options.vision, packaged(options.text), options.out)
    print(f"written to {options.out}")


def packaged(place: str) -> str:
    """Return the folder inside an installed package, or the place itself if it is a folder."""
    package, _, folder = place.partition("/")
    if Path(place).is_dir() or not package.isidentifier():
        return place
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"--text must be a folder or an installed package, got {place}")
    return str(Path(spec.submodule_search_locations[0]) / folder)


def join(vision: str, text: str, out: Path) -> None:
    """Write the joint model with both processors; the projections depend on a fixed seed."""
    torch.manual_seed(0)
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(vision, text)
    model.save_pretrained(out)
    images = AutoImageProcessor.from_pretrained(vision, backend="pil")
    VisionTextDualEncoderProcessor(images, AutoTokenizer.from_pretrained(text)).save_pretrained(out)


if __name__ == "__main__":
    main(__doc__, join)
