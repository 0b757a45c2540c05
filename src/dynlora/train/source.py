"""Locate the pretrained model of section `model`: on the hub, in a folder, package or GGUF file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from dynlora.adapter_files.base_models import UNLOADABLE, Source
from dynlora.errors import ConfigError
from dynlora.train.config import ModelConfig
from dynlora.train.config.sections import UNQUANTIZED

__all__ = ["Source", "loading", "locate", "locate_teacher"]


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
    except UNLOADABLE as error:
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
