"""Section `data`: which rows to learn from, and what their columns mean."""

from dataclasses import dataclass
from typing import Literal

from dynlora.errors import ConfigError
from dynlora.train.config.checks import require, require_one


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which rows to learn from, and which columns hold what."""

    name: str | None = None
    """Data set on the Hugging Face hub, such as `nyu-mll/glue`."""
    subset: str | None = None
    """Configuration of the hub data set, such as `mrpc`."""
    path: str | None = None
    """Local folder with one .parquet, .csv, .jsonl or (images) .npz file a split, named after it,
    or one such file, of which `validation_fraction` is held out; or a folder with one folder a
    split, in which one folder a class holds images. Wins over `name` and `embedded`."""
    embedded: Literal["stdlib"] | None = None
    """Data set made on this machine: `stdlib` pairs the first sentence of each docstring of
    Python's standard library with a function signature; label 1 if it describes that function."""
    text: str = "text"
    """Column of the text, or of the first text of a pair; of a list of words for
    `token_classification`."""
    text_pair: str | None = None
    """Column of the second text of a pair; null where there is one text."""
    prompt: str | None = None
    """Column of what `causal_lm` goes on from; null where `text` or `messages` holds it all."""
    completion: str | None = None
    """Column of what is to come after the prompt."""
    separator: str = "\n"
    """Text between prompt and completion; without effect with `as_chat`."""
    as_chat: bool = False
    """Make the prompt a user's turn and the completion the assistant's, in the model's chat
    template."""
    messages: str | None = None
    """Column of conversations for `causal_lm`, each a list of `{role, content}`, put into the
    model's chat template."""
    completion_only: bool = True
    """Learn the completion alone, of conversations the assistant's turns; false learns every token,
    as is always done with `text`."""
    max_new_tokens: int = 128
    """Most tokens that `causal_lm` writes when it predicts, at least 1."""
    image: str = "image"
    """Column of the images for `image_classification`: encoded bytes, such as a JPEG's; a path,
    which begins at the data file's folder; or Hugging Face's `{bytes, path}`."""
    label: str = "label"
    """Column of what is to be learned: a class (a whole number from 0 on); a number for
    `regression`; a list of classes for `multi_label`; a list of numbers, as many as the model's
    hidden size, for `embedding`; and one class a word for `token_classification`."""
    num_labels: int | None = None
    """Number of classes; null takes the highest training label plus 1."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split to evaluate on."""
    validation_rows_from_train: int | None = None
    """Hold out this many training rows and evaluate on them instead of on `validation_split`, which
    is then left for a test. Which rows they are depends on the training split alone, not on a seed
    or on `max_train_rows`; null holds out none. At least 1."""
    validation_fraction: float = 0.1
    """Part of the rows held out for validation where `path` is a single file, in (0, 1);
    `validation_rows_from_train` wins over it."""
    max_length: int = 128
    """Longest input in tokens, special tokens included; longer texts are cut. At least 8."""
    max_train_rows: int | None = None
    """Train on a random sample of this many rows; null takes all."""
    max_validation_rows: int | None = None
    """Evaluate on a random sample of this many rows; null takes all."""

    def __post_init__(self) -> None:
        """Check the source, then each value.

        Raises:
            ConfigError: If there is no source or more than one, a value is outside its range, or
                columns of two formats are named.
        """
        if self.path is None:
            require_one("data", name=self.name, embedded=self.embedded)
        fraction = self.validation_fraction
        require(0 < fraction < 1, "data.validation_fraction", "in (0, 1)", fraction)
        require(self.max_length >= 8, "data.max_length", "at least 8", self.max_length)
        limits = ("max_train_rows", "max_validation_rows", "validation_rows_from_train")
        for key in ("num_labels", *limits):
            value, low = getattr(self, key), 2 if key == "num_labels" else 1
            require(value is None or value >= low, f"data.{key}", f"at least {low}", value)
        require(self.max_new_tokens >= 1, "data.max_new_tokens", "at least 1", self.max_new_tokens)
        self._check_format()

    def _check_format(self) -> None:
        pair, messages = (self.prompt, self.completion), self.messages
        if pair.count(None) == 1:
            raise ConfigError(
                "`data.prompt` and `data.completion` must be given together, got only "
                f"`data.{'prompt' if self.completion is None else 'completion'}`: name both "
                "columns, or use `data.text` for texts without a prompt."
            )
        if messages is not None and self.prompt is not None:
            raise ConfigError(
                f"`data.messages` must be null with `data.prompt`, got {messages}: conversations "
                "hold their prompts themselves, so leave out one of the two."
            )
        if self.as_chat and self.prompt is None:
            raise ConfigError(
                "`data.as_chat` must be false without `data.prompt`, got true: it makes two turns "
                "of a prompt and a completion; conversations need only `data.messages`."
            )
