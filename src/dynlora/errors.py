"""Errors that a user can fix: each message states the requirement, the value and the next step.

The command line prints a `DynamicLoraError` as one `error:` line with exit code 2. Any other
exception is a bug in dynlora and keeps its traceback.
"""

from collections.abc import Sequence


class DynamicLoraError(Exception):
    """Base class of errors that a user can fix."""


class ConfigError(DynamicLoraError):
    """A setting has a value outside its range, or two settings contradict each other."""


class BudgetError(DynamicLoraError):
    """The budget cannot be spent within the ranks that the layers allow."""


class LayerError(DynamicLoraError):
    """The model has no LoRA layer, or one that cannot be resized."""


class OptimizerError(DynamicLoraError):
    """The optimizer's state cannot follow a change of rank."""


class EngineError(DynamicLoraError):
    """The engine does not support changes of rank, or was attached at the wrong time."""


class NonFiniteError(DynamicLoraError):
    """A loss, gradient, score or weight is NaN or infinite."""


class ResumeError(DynamicLoraError):
    """Saved state does not belong to this model or configuration, or is missing."""


class DataError(DynamicLoraError):
    """A data set lacks a column or a split, or contains a label out of range."""


class RunFolderError(DynamicLoraError):
    """The output folder already contains a run."""


class RunFileError(DynamicLoraError):
    """A file of a finished run is missing, truncated or malformed."""


class AdapterError(DynamicLoraError):
    """A saved adapter cannot be read, does not fit its base model, or cannot be written."""


_SKIP = "lower the learning rate, or set on_nonfinite='skip' to leave such steps out."
_ADVICE = {
    "gradient": _SKIP,
    "score": _SKIP,
    "weights": (
        "the run has diverged; go back to an earlier checkpoint and lower the learning rate."
    ),
}


def check_finite(broken: Sequence[str], kind: str, *, step: int, layers: int) -> None:
    """Check that no layer has a broken "gradient", "score" or "weights" with NaN or infinity.

    Raises:
        NonFiniteError: If `broken` is not empty.
    """
    if broken:
        raise NonFiniteError(
            f"The {kind} of {broken[0]!r} must be finite, got NaN or infinity at step {step} "
            f"(in {len(broken)} of {layers} layers): {_ADVICE[kind]}"
        )


_NO_MEMORY = ("not enough memory", "can't allocate memory")
"""Parts of torch's messages on a CPU, where such errors have no class."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means too little memory, on a GPU or a CPU.

    It compares the name of torch's class, so that torch need not be imported.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in str(error) for sign in _NO_MEMORY)
