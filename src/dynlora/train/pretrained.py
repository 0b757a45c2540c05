"""Locate, load and check a pretrained model, also quantized by bitsandbytes, and its tokenizer.

The model is on the hub, in a folder, in a Python package or in a GGUF file.
"""

import io
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedTokenizerBase,
)

from dynlora.adapter_files import base_models
from dynlora.adapter_files.base_models import Source
from dynlora.engines.checks import keep_gradients
from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig, ModelConfig
from dynlora.train.config.sections import UNQUANTIZED
from dynlora.train.methods.full_modules import (
    new_projections,
    note_new,
    outer_modules,
    poolers,
    projectors,
    unread_poolers,
)

logger = logging.getLogger(__name__)


def locate(config: ModelConfig) -> Source:
    """Return the source of the model, its configuration and its tokenizer."""
    if config.quantization is not None and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"`model.quantization: {config.quantization}` needs the package bitsandbytes, which is "
            "not installed: pip install 'dynlora[quantized]'"
        )
    return Source(
        place=_place(config),
        gguf_file=config.gguf_file,
        dtype=config.dtype,
        quantization=config.quantization,
    )


def locate_teacher(config: ModelConfig) -> Source | None:
    """Return the source of the model whose outputs are learned; None without `model.teacher`."""
    if config.teacher is None:
        return None
    if config.teacher == UNQUANTIZED:
        return locate(replace(config, quantization=None, teacher=None))
    folder = Path(config.teacher)
    place = _checked(folder, "model.teacher", None) if folder.is_dir() else config.teacher
    return Source(place, dtype=config.dtype)


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
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf_file is not None and not (folder / gguf_file).is_file():
        raise ConfigError(
            f"`model.gguf_file` must name a file in {folder}, got {gguf_file!r}, which is not "
            f"there: its GGUF files are: {', '.join(files) or 'none'}."
        )
    if gguf_file is None and not (folder / "config.json").is_file():
        advice = f" For a model in a GGUF file set `model.gguf_file: {files[0]}`." if files else ""
        raise ConfigError(
            f"`{key}` must name a folder with a model (config.json, weights, tokenizer), got "
            f"{folder}, which has no config.json.{advice}"
        )
    return str(folder.absolute())  # saved in the adapter, which may be loaded from elsewhere


@contextmanager
def loading(what: str, source: Source) -> Iterator[None]:
    """Translate the errors of transformers for a model, tokenizer or processor."""
    try:
        yield
    except base_models.UNLOADABLE as error:
        reason = " ".join(str(error).split())
        if source.gguf_file is not None:
            raise ConfigError(
                f"{source.label} must be a whole GGUF file of an architecture that transformers "
                f"can read, but reading it failed with {type(error).__name__}: "
                f"{reason.rstrip('.')}. Download it again if it was cut short; of another "
                "architecture use the model's Hugging Face folder."
            ) from error
        advice = " Without the hub, name a model that is here as `model.path` or `model.package`."
        if Path(source.place).is_dir():
            advice = ""
        raise ConfigError(
            f"the {what} of {source.label} could not be loaded: {reason}{advice}"
        ) from error


def load_tokenizer(source: Source, max_length: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model at `source`, with a padding token."""
    tokenizer: PreTrainedTokenizerBase
    with loading("tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options)
        config = AutoConfig.from_pretrained(source.place, **source.options)
    model = config.get_text_config().to_dict()
    _check_vocabulary(tokenizer, model.get("vocab_size"), source.label)
    # Models without absolute positions lack these keys; tokenizers without a limit report 1e30.
    limits = [tokenizer.model_max_length, *(model.get(key) for key in base_models.LENGTH_KEYS)]
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
    limit = base_models.position_limit(model)
    if limit is not None and config.max_length > limit:
        raise _too_long(limit, f"a {type(model).__name__}", config.max_length)


def _too_long(limit: int, of: str, given: int) -> ConfigError:
    return ConfigError(
        f"`data.max_length` must be at most {limit}, the longest input of {of}, got {given}."
    )


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int | None, source: str
) -> None:
    """Refuse a vocabulary that is too large, or empty, as transformers makes from missing files."""
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
    """Load the model at `source` with the head of `auto_class`.

    Without arguments of the `head`, such as `num_labels`, the files must contain all weights except
    those of an unused pooler or of new projectors. New weights come from torch's random state.
    """
    options = {"dtype": source.dtype} | head
    if source.gguf_file is not None:
        # transformers would keep quantized blocks, which can be neither trained nor saved.
        options["quantization_config"] = GgufConfig(dequantize=True)
    # transformers' progress bar for GGUF files has no option.
    hidden = nullcontext() if source.gguf_file is None else redirect_stderr(io.StringIO())
    with loading("model", source), hidden:
        model, random = _load(auto_class, source, options, ())
        new = _all_random(model, poolers(model) if head else projectors(model), random)
        may_be = [*new, *(outer_modules(model) if head else unread_poolers(model))]
        wrong = [name for name in random if not base_models.within(name, may_be)]
        base_models.refuse_random(model, wrong)
        if source.quantization is not None:
            if new:
                model, _ = _load(auto_class, source, options, new)
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            # Otherwise the evaluation before training would repack weights for inference only.
            keep_gradients(model)
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
    """Return the model, and the names of its randomly initialized weights.

    `nf4` is as in QLoRA (Dettmers and others 2023, arXiv 2305.14314). The head and the modules
    `whole` are not quantized.
    """
    if source.quantization is None:
        return base_models.load_weights(auto_class, source.place, **source.options, **options)
    if source.quantization == "int8":
        precision: dict[str, Any] = {"load_in_8bit": True}
    else:
        precision = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": source.quantization,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": getattr(torch, options["dtype"]),
        }

    def bits(shape: Any) -> dict[str, Any]:
        names = _unquantized_modules(shape, whole)
        settings: Any = BitsAndBytesConfig(llm_int8_skip_modules=names, **precision)  # type: ignore[no-untyped-call]
        return {"quantization_config": settings}

    if source.gguf_file is not None:  # dequantized, because it has its own quantization
        with TemporaryDirectory() as folder:
            restored, random = base_models.load_weights(
                auto_class, source.place, **source.options, **options
            )
            restored.save_pretrained(folder)
            model, _ = base_models.load_weights(auto_class, folder, **options | bits(restored))
    else:
        with torch.device("meta"):  # only the module names are needed
            config = AutoConfig.from_pretrained(source.place, **source.options)
            shape = auto_class.from_config(config, **base_models.NO_CODE)
        how = source.options | options | bits(shape)
        model, random = base_models.load_weights(auto_class, source.place, **how)
    return model, random


def _unquantized_modules(model: Any, more: Sequence[str]) -> list[str] | None:
    """Return the names of the head, which transformers would miss if it has a bias, and `more`."""
    names = [name for name, _ in model.named_children()]
    if model.base_model_prefix not in names:
        return [*more, *new_projections(model)] or None
    return [*(name for name in names if name != model.base_model_prefix), *more]


def _all_random(model: Any, modules: Sequence[str], random: Collection[str]) -> list[str]:
    """Return the modules without weights in the files, such as poolers of published encoders."""
    return [
        name
        for name in modules
        if all(f"{name}.{key}" in random for key in model.get_submodule(name).state_dict())
    ]
