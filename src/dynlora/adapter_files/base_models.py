"""Load base models without running code beside them, and find randomly initialized weights.

Transformers only logs such weights; `refuse_random` makes them an error.
"""

import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

UNLOADABLE = (
    OSError, ValueError, ImportError, LookupError, TypeError, RuntimeError, struct.error,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""Errors of transformers for missing or broken files or packages, or an unknown architecture."""
LENGTH_KEYS = ("max_position_embeddings", "n_positions")  # keys of the number of positions
NO_CODE = {"trust_remote_code": False}  # by default transformers asks whether to run the code


@dataclass(frozen=True, slots=True)
class Source:
    """Location and loading options of a pretrained model."""

    place: str  # folder or hub name
    gguf_file: str | None = None  # name of the GGUF file in the folder, if any
    dtype: str = "float32"
    quantization: str | None = None  # `nf4` or `int8` for linear layers in 4 or 8 bits
    local_only: bool = False  # whether downloads are forbidden

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`; never runs code from the model's folder."""
        file = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return NO_CODE | file | {"local_files_only": self.local_only}

    @property
    def label(self) -> str:
        """The file, folder or hub name."""
        return self.place if self.gguf_file is None else str(Path(self.place, self.gguf_file))


def load_weights(form: Any, place: str, **options: Any) -> tuple[Any, frozenset[str]]:
    """Return a model and the names of its randomly initialized weights.

    Tied weights and computed buffers do not count.
    """
    model, info = form.from_pretrained(
        place, ignore_mismatched_sizes=True, output_loading_info=True, **options | NO_CODE
    )
    unlike = {name for name, *_ in info["mismatched_keys"]}
    return model, frozenset(info["missing_keys"] | unlike)


def refuse_random(model: Any, random: Collection[str]) -> None:
    """Raise `ValueError`, one of `UNLOADABLE`, if any weights are randomly initialized."""
    if not random:
        return
    names = list(model.state_dict())
    first = next((name for name in names if name in random), min(random))
    if 2 * len(random) > len(names):
        advice = "the files hold another model than config.json says: download both again."
    else:
        advice = "use the config.json and the files that were saved together."
    raise ValueError(
        f"{len(random)} of its {len(names)} weights are missing in its files or have another shape "
        f"there, the first is {first!r}, and would be left at random values: {advice}"
    )


def position_limit(model: Any) -> int | None:
    """Return the largest number of tokens of a model; None if unlimited."""
    config = model.config.get_text_config().to_dict()
    limits = [config[key] for key in LENGTH_KEYS if isinstance(config.get(key), int)]
    for name, module in model.named_modules():
        # In RoBERTa and related models, positions start after the padding token's index.
        skipped = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and skipped is not None:
            limits.append(module.num_embeddings - skipped - 1)
    return min(limits, default=None)


def within(name: str, modules: Collection[str]) -> bool:
    """Return whether `name` is one of the modules, or a module or weight inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
