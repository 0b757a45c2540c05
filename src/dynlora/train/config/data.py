"""Section `data`: which rows to learn from, and what their columns mean."""

from dataclasses import dataclass
from typing import Literal

from dynlora.train.config.checks import require, require_one


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which rows to learn from, and which columns hold what."""

    name: str | None = None
    """Data set on the Hugging Face hub, such as `nyu-mll/glue`."""
    subset: str | None = None
    """Configuration of the hub data set, such as `mrpc`."""
    path: str | None = None
    """Local folder with one .parquet, .csv or .jsonl file a split, named after it, or one such
    file, of which `validation_fraction` is held out. Wins over `name` and `embedded`."""
    embedded: Literal["stdlib"] | None = None
    """Data set made on this machine: `stdlib` pairs the first sentence of each docstring of
    Python's standard library with a function signature; label 1 if it describes that function."""
    text: str = "text"
    """Column of the text, or of the first text of a pair; of a list of words for
    `token_classification`."""
    text_pair: str | None = None
    """Column of the second text of a pair; null where there is one text."""
    label: str = "label"
    """Column of what is to be learned: a class (a whole number from 0 on); a number for
    `regression`; a list of classes for `multi_label`, and one class a word for
    `token_classification`."""
    num_labels: int | None = None
    """Number of classes; null takes the highest training label plus 1."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split to evaluate on."""
    validation_fraction: float = 0.1
    """Part of the rows held out for validation where `path` is a single file, in (0, 1)."""
    max_length: int = 128
    """Longest input in tokens, special tokens included; longer texts are cut. At least 8."""
    max_train_rows: int | None = None
    """Train on a random sample of this many rows; null takes all."""
    max_validation_rows: int | None = None
    """Evaluate on a random sample of this many rows; null takes all."""

    def __post_init__(self) -> None:
        """Check the source, then each value.

        Raises:
            ConfigError: If there is no source or more than one, or a value is outside its range.
        """
        if self.path is None:
            require_one("data", name=self.name, embedded=self.embedded)
        fraction = self.validation_fraction
        require(0 < fraction < 1, "data.validation_fraction", "in (0, 1)", fraction)
        require(self.max_length >= 8, "data.max_length", "at least 8", self.max_length)
        for key in ("num_labels", "max_train_rows", "max_validation_rows"):
            value, low = getattr(self, key), 2 if key == "num_labels" else 1
            require(value is None or value >= low, f"data.{key}", f"at least {low}", value)
