"""The whole configuration of one training job."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from operator import attrgetter
from typing import Literal, get_args

from pydantic.dataclasses import dataclass

from dynlora.adapters.patterns import changes_base
from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError
from dynlora.train.config.adapter import AdaLoraSettings, DynamicSection, LoraSettings, StartName
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


NOT_CAUSAL = {*get_args(TaskName)} - {"causal_lm"}
PAIRS = {"sequence_classification", "regression", "multi_label", "embedding"}
NOT_LORA = {"adalora", "full"}
NO_NOISE = {"dpo", "image_classification", "image_text_retrieval"}
FROM_BASE = {start for start in get_args(StartName) if changes_base(start)}
"""Starts that take a part of the base weights, which cannot be rounded."""
RULES: Sequence[tuple[str, tuple[object, ...], Collection[object]]] = (
    ("data.text_pair", (None,), {*get_args(TaskName)} - PAIRS),
    ("data.messages", (None,), NOT_CAUSAL),
    ("method", ("dynamic", "lora"), {"dpo"}),  # its reference is the model without adapter
    ("model.teacher", (None,), NOT_CAUSAL),
    ("model.quantization", (None,), {"full", *FROM_BASE}),
    ("model.dtype", ("float32",), {"full", *FROM_BASE}),  # steps are smaller than roundings
    ("lora.start_from", (None,), NOT_LORA),
    ("lora.use_dora", (False,), NOT_LORA | FROM_BASE),  # DoRA's norms are of the whole weights
    ("lora.use_rslora", (False,), NOT_LORA),
    ("lora.init_lora_weights", (True,), NOT_LORA),
    ("lora.init_lora_weights", (True, "gaussian", "orthogonal", "eva"), {"dynamic", "dpo"}),
    ("lora.lora_dropout", (0,), {"dpo"}),  # as TRL sets it
    ("training.loraplus_lr_ratio", (None,), NOT_LORA),
    ("training.packing", (False,), NOT_CAUSAL),
    ("training.neftune_noise_alpha", (None,), NO_NOISE),
    # PEFT does not save the importance and masks that AdaLoRA's ranks follow.
    ("training.resume", ("none",), {"adalora"}),
    ("training.load_best_model_at_end", (False,), {"adalora"}),
)
"""A key, its only valid values, and the tasks, methods and starts with which they are."""


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
        start = self.lora.init_lora_weights
        chosen = {"task": self.task, "method": self.method, "lora.init_lora_weights": start}
        for key, valid, names in RULES:
            value = attrgetter(key)(self)
            for by in (by for by, name in chosen.items() if name in names):
                required = f"{' or '.join(map(_shown, valid))} with `{by}: {chosen[by]}`"
                require(value in valid, key, required, _shown(value))
        size, retrieval = self.training.batch_size, self.task == "image_text_retrieval"
        required = "at least 2 with `task: image_text_retrieval`, to compare rows of a batch"
        require(size > 1 or not retrieval, "training.batch_size", required, size)
        optim = self.training.optim
        fits = self.training.loraplus_lr_ratio is None or optim.startswith("adamw_torch")
        require(fits, "training.optim", "an AdamW of torch with LoRA+", optim)
        init_r, target = self.adalora.init_r, self.lora.r
        required = f"> lora.r={target}, AdaLoRA's target rank"
        fits = init_r is None or init_r > target or self.method != "adalora"
        require(fits, "adalora.init_r", required, init_r)


def _shown(value: object) -> str:
    """Return a value as in YAML."""
    return json.dumps(value).strip('"')
