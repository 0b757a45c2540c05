"""Load and check the pretrained model and its tokenizer from section `model`."""

import io
import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from dynlora.adapter_files.base_models import (
    LENGTH_KEYS,
    NO_CODE,
    UNLOADABLE,
    load_weights,
    position_limit,
    refuse_drawn,
    within,
)
from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig, ModelConfig
from dynlora.train.methods.full_modules import note_new, outer_modules, poolers, unread_poolers
from dynlora.train.methods.quantized import check_quantizer, load_quantized, make_trainable

logger = logging.getLogger(__name__)

GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Location and loading options of a pretrained model."""

    place: str
    """Folder or hub name."""
    gguf_file: str | None = None
    """Name of the GGUF file in the folder, if any."""
    weight_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's `from_pretrained`."""
    quantization: str | None = None
    """`nf4` or `int8` for linear layers in 4 or 8 bits; None for no quantization."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for model, configuration and processor."""
        return NO_CODE if self.gguf_file is None else NO_CODE | {"gguf_file": self.gguf_file}

    @property
    def label(self) -> str:
        """Folder or hub name, with the GGUF file if there is one."""
        return self.place if self.gguf_file is None else f"{self.place}/{self.gguf_file}"


def locate(config: ModelConfig) -> Source:
    """Return the source of the model, its configuration and its tokenizer."""
    if config.quantization is not None:
        check_quantizer(config.quantization)
    options: dict[str, Any] = {"dtype": config.dtype}
    if config.gguf_file is not None:
        # transformers would keep quantized blocks, which can be neither trained nor saved.
        options["quantization_config"] = GgufConfig(dequantize=True)
    return Source(
        place=_place(config),
        gguf_file=config.gguf_file,
        weight_options=options,
        quantization=config.quantization,
    )


def _place(config: ModelConfig) -> str:
    """Return the folder or hub name to load from."""
    if config.path is not None:
        return _checked(Path(config.path), "model.path", config.gguf_file)
    if config.package is None:
        return str(config.name)
    package, _, folder = config.package.partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"`model.package` must begin with an installed Python package, got {package!r}, which "
            f"is not installed: pip install {package.replace('_', '-')}"
        )
    place = Path(spec.submodule_search_locations[0]) / folder
    return _checked(place, "model.package", config.gguf_file)


def _checked(folder: Path, key: str, gguf_file: str | None) -> str:
    if gguf_file is not None:
        _check_gguf(folder / gguf_file)
    elif not (folder / "config.json").is_file():
        files = _gguf_files(folder)
        advice = f" For a model in a GGUF file set `model.gguf_file: {files[0]}`." if files else ""
        raise ConfigError(
            f"`{key}` must name a folder with a model (config.json, weights, tokenizer), got "
            f"{folder}, which has no config.json.{advice}"
        )
    return str(folder.absolute())  # saved in the adapter, which may be loaded from elsewhere


def _gguf_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.gguf"))


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(
            f"`model.gguf_file` must name a file in {path.parent}, got {path.name!r}, which is not "
            f"there: its GGUF files are: {', '.join(_gguf_files(path.parent)) or 'none'}."
        )
    with path.open("rb") as file:
        start = file.read(len(GGUF_MAGIC))
    if start != GGUF_MAGIC:
        raise ConfigError(
            f"`model.gguf_file` must be in the GGUF format and so begin with {GGUF_MAGIC!r}, got "
            f"{start!r} in {path}: download it again, or set `model.path` alone for a Hugging Face "
            "model."
        )


def load_tokenizer(source: Source, max_length: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model at `source`, with a padding token."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.place, **source.options
        )
        model = AutoConfig.from_pretrained(source.place, **source.options).to_dict()
    except UNLOADABLE as error:
        raise not_loaded("tokenizer", source, error) from error
    _check_vocabulary(tokenizer, model.get("vocab_size"), source.label)
    # Models without absolute positions lack these keys; tokenizers without a limit report 1e30.
    limits = [tokenizer.model_max_length, *(model.get(key) for key in LENGTH_KEYS)]
    limit = min(limit for limit in limits if limit is not None)
    if max_length > limit:
        raise _too_long(limit, source.label, max_length)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of {source.label} must have a padding or an end-of-text token to "
                "put texts of different lengths into one batch, got neither: add `pad_token` to "
                "its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(model: Any, config: DataConfig) -> None:
    """Check that the model has `data.max_length` positions; its configuration may claim more."""
    limit = position_limit(model)
    if limit is not None and config.max_length > limit:
        raise _too_long(limit, f"a {type(model).__name__}", config.max_length)


def _too_long(limit: int, of: str, given: int) -> ConfigError:
    return ConfigError(
        f"`data.max_length` must be at most {limit}, the longest input of {of}, got {given}."
    )


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int | None, source: str
) -> None:
    """Check that the vocabulary is not empty and fits the model's embeddings.

    transformers returns a tokenizer without words if the vocabulary files are missing.
    """
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if not words:
        raise ConfigError(
            f"the tokenizer of {source} could not be loaded: it knows no word, so its files "
            "(tokenizer.json or a vocabulary) are missing. Save the tokenizer beside the model."
        )
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise ConfigError(
            f"the tokenizer of {source} must fit the model, which has {vocab_size} embeddings, got "
            f"{len(tokenizer)} tokens: use the tokenizer that the model was trained with."
        )


def load_model(auto_class: Any, source: Source, **head: Any) -> Any:
    """Load the model at `source` with the head of `auto_class`, an auto class of transformers.

    The head is initialized from torch's random state unless the files contain one that fits.

    Without arguments of the `head`, such as `num_labels`, the files must contain all weights except
    those of an unused pooler. The default dtype is float32.
    """
    options = {"dtype": "float32"} | source.weight_options | head
    try:
        # transformers' progress bar for GGUF files has no option.
        with nullcontext() if source.gguf_file is None else redirect_stderr(io.StringIO()):
            model, drawn = _load(auto_class, source, options, ())
            new = _new_poolers(model, drawn) if head else []
            may_be = [*outer_modules(model), *new] if head else unread_poolers(model)
            refuse_drawn(model, [name for name in drawn if not within(name, may_be)])
            if source.quantization is not None:
                if new:
                    model, _ = _load(auto_class, source, options, new)
                model = make_trainable(model)
    except UNLOADABLE as error:
        raise not_loaded("model", source, error) from error
    if new:
        note_new(model, new)
        logger.warning(
            "the files of %s have no weights for %s, which the task needs: they begin at random "
            "values, and are trained and saved whole, as the head is.",
            source.label, ", ".join(new),
        )  # fmt: skip
    # PEFT saves it as `base_model_name_or_path`.
    model.name_or_path = source.label
    return model


def _load(
    auto_class: Any, source: Source, options: dict[str, Any], whole: Sequence[str]
) -> tuple[Any, frozenset[str]]:
    """Return the model, without quantization of `whole`, and its randomly initialized weights."""
    if source.quantization is None:
        return load_weights(auto_class, source.place, **source.options, **options)
    return load_quantized(
        auto_class, source.place, source.quantization, source.options, options, whole
    )


def _new_poolers(model: Any, drawn: Collection[str]) -> list[str]:
    """Return the names of poolers without weights in the files, as in many published encoders."""
    return [
        name
        for name in poolers(model)
        if all(f"{name}.{key}" in drawn for key in model.get_submodule(name).state_dict())
    ]


def not_loaded(what: str, source: Source, error: Exception) -> ConfigError:
    """Return the error for a model, tokenizer or processor that cannot be loaded."""
    reason = " ".join(str(error).split())
    if source.gguf_file is not None:
        return ConfigError(
            f"{source.label} must be a whole GGUF file of an architecture that transformers can "
            f"read, but reading it failed with {type(error).__name__}: {reason.rstrip('.')}. "
            "Download it again if it was cut short; of another architecture use the model's "
            "Hugging Face folder."
        )
    advice = " Without the hub, name a model that is here as `model.path` or `model.package`."
    if Path(source.place).is_dir():
        advice = ""
    return ConfigError(f"the {what} of {source.label} could not be loaded: {reason}{advice}")
