"""The whole configuration of one training job."""

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from dynlora.adapters.patterns import changes_base
from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError
from dynlora.train.config.adapter import AdaLoraSettings, DynamicSection, LoraSettings
from dynlora.train.config.sections import (
    SECTION,
    DataConfig,
    ModelConfig,
    Switch,
    TrainingConfig,
    require,
)

TaskName = Literal[
    "sequence_classification",
    "regression",
    "multi_label",
    "embedding",
    "token_classification",
    "causal_lm",
    "dpo",
    "image_classification",
    "image_text_retrieval",
    "image_text_to_text",
]
Method = Literal["dynamic", "lora", "adalora", "full"]

METRICS: Mapping[TaskName, tuple[str, ...]] = {
    "sequence_classification": ("accuracy", "f1", "matthews", "loss"),
    "regression": ("pearson", "spearman", "rmse", "loss"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match", "loss"),
    "embedding": ("r2", "cosine", "loss"),
    "token_classification": ("accuracy", "macro_f1", "loss"),
    "causal_lm": ("token_accuracy", "perplexity", "loss"),
    "dpo": ("reward_accuracy", "reward_margin", "loss"),
    "image_classification": ("accuracy", "f1", "matthews", "loss"),
    "image_text_retrieval": (
        "text_to_image_recall_1",
        "image_to_text_recall_1",
        "text_to_image_recall_5",
        "image_to_text_recall_5",
        "loss",
    ),
    "image_text_to_text": ("token_accuracy", "perplexity", "loss"),
}
"""Validation metrics by task, in display order, the main one first."""


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class JobConfig:
    """One training job."""

    output: str
    """Folder of the run: adapter, metrics, rank history, checkpoints."""
    overwrite: Switch = False
    """Replace the run that `output` already contains."""
    task: TaskName = "sequence_classification"
    """What the model learns: `sequence_classification` (one class per text), `regression` (a
    number), `multi_label` (any number of classes), `embedding` (a vector, the mean of the last
    hidden states), `token_classification` (a class per word), `causal_lm` (to continue a text),
    `dpo` (to prefer one of two answers), `image_classification`, `image_text_retrieval` (which
    caption belongs to which image), or `image_text_to_text` (to write captions, or answers to
    questions on images)."""
    method: Method = "dynamic"
    """What is trained: `dynamic` moves LoRA ranks between layers, `lora` and `adalora` are PEFT's,
    `full` trains every weight."""
    model: ModelConfig
    """The pretrained model to fine-tune."""
    data: DataConfig
    """Rows to learn from."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA adapter."""
    dynamic: DynamicSection = field(default_factory=DynamicLoraConfig)
    """How ranks move with `method: dynamic`."""
    adalora: AdaLoraSettings = field(default_factory=AdaLoraSettings)
    """AdaLoRA's own settings with `method: adalora`."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How to train."""

    def __post_init__(self) -> None:
        """Check how sections fit together."""
        output = self.output
        require(bool(output.strip()), "output", "the path of a folder", repr(output))
        home = output.startswith("~")
        require(not home, "output", "a full path, because only shells expand ~", output)
        metric, known = self.training.best_metric, METRICS[self.task]
        required = f"a metric of `task: {self.task}`, one of {', '.join(known)}"
        require(metric is None or metric in known, "training.best_metric", required, metric)
        alone = {"prompt": self.data.prompt, "completion": self.data.completion}
        given = [key for key, column in alone.items() if column is not None]
        if len(given) == 1 and (self.task, *given) != ("dpo", "prompt"):
            raise ConfigError(
                "`data.prompt` and `data.completion` must be given together, but got only "
                f"`data.{given[0]}`. Name both columns, or use `data.text` without a prompt."
            )
        size, retrieval = self.training.batch_size, self.task == "image_text_retrieval"
        required = "at least 2 with `task: image_text_retrieval`, to compare rows of a batch"
        require(size > 1 or not retrieval, "training.batch_size", required, size)
        teacher = self.model.teacher
        required = f"null with `task: {self.task}`"
        require(teacher is None or self.task == "causal_lm", "model.teacher", required, teacher)
        noise, optim = self.training.neftune_noise_alpha, self.training.optim
        noiseless = ("dpo", "image_classification", "image_text_retrieval")
        fits = noise is None or self.task not in noiseless
        require(fits, "training.neftune_noise_alpha", required, noise)
        fits = self.task == "causal_lm" or not self.training.packing
        require(fits, "training.packing", f"false with `task: {self.task}`", "true")
        fits = self.training.loraplus_lr_ratio is None or optim.startswith("adamw_torch")
        require(fits, "training.optim", "an AdamW of torch with LoRA+", optim)
        self._check_method()
        self._check_start()

    def _check_method(self) -> None:
        plus, start = self.training.loraplus_lr_ratio, self.lora.start_from
        plain = self.method in ("dynamic", "lora")
        unset = f"null with `method: {self.method}`"
        require(plain or plus is None, "training.loraplus_lr_ratio", unset, plus)
        require(plain or start is None, "lora.start_from", unset, start)
        if self.task == "dpo":
            required = "dynamic or lora with `task: dpo`, whose reference has no adapter"
            require(plain, "method", required, self.method)
            rate = self.lora.lora_dropout
            require(rate == 0, "lora.lora_dropout", "0 with `task: dpo`, as TRL sets it", rate)
        if self.method == "full":
            # Training steps are smaller than the rounding of such weights.
            self._require_full_precision("with `method: full`")
        init_r, target = self.adalora.init_r, self.lora.r
        required = f"> lora.r={target}, AdaLoRA's target rank"
        require(init_r is None or init_r > target, "adalora.init_r", required, init_r)
        loads = self.training.resume != "none" or self.training.load_best_model_at_end
        if self.method == "adalora" and loads:
            raise ConfigError(
                "`method: adalora` cannot load its own checkpoints, because PEFT does not save "
                "the importance and masks that its ranks follow. Set `training.resume: none` "
                "and `training.load_best_model_at_end: false`, or use `method: dynamic`."
            )

    def _check_start(self) -> None:
        """Check that the method supports the adapter's variant and initialization."""
        method, start = self.method, self.lora.init_lora_weights
        unset = f"false with `method: {method}`"
        if method in ("adalora", "full"):
            require(not self.lora.use_dora, "lora.use_dora", unset, "true")
            required = f"true with `method: {method}`"
            require(start is True, "lora.init_lora_weights", required, start)
            require(not self.lora.use_rslora, "lora.use_rslora", unset, "true")
        if method == "dynamic" or self.task == "dpo":
            known = ("true", "gaussian", "orthogonal", "eva")
            reason = "method: dynamic" if method == "dynamic" else "task: dpo"
            required = f"one of {', '.join(known)} with `{reason}`"
            require(str(start).lower() in known, "lora.init_lora_weights", required, start)
        if changes_base(start):
            # A part of rounded weights cannot be removed and restored exactly.
            self._require_full_precision(f"with `lora.init_lora_weights: {start}`")

    def _require_full_precision(self, reason: str) -> None:
        bits, dtype = self.model.quantization, self.model.dtype
        require(bits is None, "model.quantization", f"null {reason}", bits)
        require(dtype == "float32", "model.dtype", f"float32 {reason}", dtype)
