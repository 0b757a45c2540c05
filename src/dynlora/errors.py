"""Errors a user can mend: each message says what was required, what was given, what to do next.

Everything that derives from `DynamicLoraError` is shown by the command line as one `error:` line
with exit code 2; any other exception is a bug of ours and keeps its traceback.
"""


class DynamicLoraError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(DynamicLoraError):
    """A setting has a value outside its range, or two settings contradict each other."""


class BudgetError(DynamicLoraError):
    """The budget cannot be spent within the ranks that the layers allow."""


class LayerError(DynamicLoraError):
    """The model holds no LoRA layer, or one that cannot be resized."""


class OptimizerError(DynamicLoraError):
    """The optimizer's state cannot follow a change of rank."""


class EngineError(DynamicLoraError):
    """The model runs under an engine that ranks cannot follow, or was attached too late."""


class NonFiniteError(DynamicLoraError):
    """A loss, gradient or score is NaN or infinite."""


class ResumeError(DynamicLoraError):
    """Saved state does not belong to this model or configuration, or is missing."""


class DataError(DynamicLoraError):
    """A data set lacks a column or a split, or holds a label out of range."""


class RunFolderError(DynamicLoraError):
    """The output folder already holds a run."""


class RunFileError(DynamicLoraError):
    """A file of a finished run is missing, cut short or not what a run writes."""


class AdapterError(DynamicLoraError):
    """A saved adapter cannot be read, does not fit its base model, or cannot be written."""


class StudyError(DynamicLoraError):
    """Some runs of a study did not complete."""


_NO_MEMORY = ("not enough memory", "can't allocate memory")
"""What torch says on a CPU, in errors that have no class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether there was not enough memory, on a GPU or for a CPU.

    By the name of torch's class: torch need not be loaded to ask.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(sign in str(error) for sign in _NO_MEMORY)
