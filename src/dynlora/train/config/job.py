"""The whole configuration of one training job."""

from dataclasses import dataclass, field
from typing import Literal

from dynlora.adapters.patterns import changes_base
from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError
from dynlora.train.config.adapter import AdaLoraSettings, LoraSettings
from dynlora.train.config.checks import require
from dynlora.train.config.data import DataConfig
from dynlora.train.config.model import ModelConfig
from dynlora.train.config.tasks import METRICS, TaskName
from dynlora.train.config.training import TrainingConfig

Method = Literal["dynamic", "lora", "adalora", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """One training job."""

    output: str
    """Folder of the run: adapter, metrics, rank history, checkpoints."""
    overwrite: bool = False
    """Replace the run that `output` already holds."""
    task: TaskName = "sequence_classification"
    """What the model learns to do: `sequence_classification` (one class a text), `regression` (a
    number), `multi_label` (any number of classes), `embedding` (a vector, as the mean of the last
    hidden states), `token_classification` (a class a word), `causal_lm` (to go on with a text), or
    `image_classification`."""
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
            ConfigError: If the task has no such metric, the method cannot do what another section
                asks for, AdaLoRA's ranks do not fall, or `output` is empty.
        """
        output = self.output
        require(bool(output.strip()), "output", "the path of a folder", repr(output))
        home = output.startswith("~")
        require(not home, "output", "a path in full, since only a shell knows what ~ is", output)
        self._check_best_metric()
        init_r = self.adalora.init_r
        if init_r is not None and init_r <= self.lora.r:
            raise ConfigError(
                f"`adalora.init_r` must be above lora.r={self.lora.r}, got {init_r}: AdaLoRA "
                "starts with more rank than its target and gives it up."
            )
        self._check_method()
        self._check_start()

    def _check_method(self) -> None:
        plus, start = self.training.loraplus_lr_ratio, self.lora.start_from
        plain = self.method in ("dynamic", "lora")
        unset = f"null with `method: {self.method}`"
        require(plain or plus is None, "training.loraplus_lr_ratio", unset, plus)
        require(plain or start is None, "lora.start_from", unset, start)
        static = self.dynamic.mode == "static"
        require(not static, "dynamic.mode", "auto or physical in one process", "static")
        if self.method == "full":
            # A rounded weight cannot take the small steps of training.
            bits, dtype = self.model.quantization, self.model.dtype
            require(bits is None, "model.quantization", unset, bits)
            require(dtype == "float32", "model.dtype", "float32 with `method: full`", dtype)
        if self.method != "adalora":
            return
        if self.training.resume != "none" or self.training.load_best_model_at_end:
            raise ConfigError(
                "`method: adalora` cannot load its own checkpoints, because PEFT does not save "
                "the importance and masks that its ranks follow: leave `training.resume: none` "
                "and `training.load_best_model_at_end: false`, or use `method: dynamic`."
            )

    def _check_start(self) -> None:
        """Check that the method can do what the adapter shall be and how it shall begin."""
        method, start = self.method, self.lora.init_lora_weights
        if method != "lora":
            unset = f"false with `method: {method}`"
            require(not self.lora.use_dora, "lora.use_dora", unset, "true")
        if method in ("adalora", "full"):
            required = f"true with `method: {method}`"
            require(start is True, "lora.init_lora_weights", required, start)
            unset = f"false with `method: {method}`"
            require(not self.lora.use_rslora, "lora.use_rslora", unset, "true")
        if method == "dynamic":
            known = ("true", "gaussian", "orthogonal", "eva")
            required = f"one of {', '.join(known)} with `method: dynamic`"
            require(str(start).lower() in known, "lora.init_lora_weights", required, start)
        if changes_base(start):
            # A base model that is rounded cannot give away a part and get it back exactly.
            beside = f"with `lora.init_lora_weights: {start}`"
            bits, dtype = self.model.quantization, self.model.dtype
            require(bits is None, "model.quantization", f"null {beside}", bits)
            require(dtype == "float32", "model.dtype", f"float32 {beside}", dtype)

    def _check_best_metric(self) -> None:
        given, known = self.training.best_metric, METRICS[self.task]
        if given is not None and given not in known:
            raise ConfigError(
                f"`training.best_metric` must be a metric of `task: {self.task}`, one of "
                f"{', '.join(known)}, got {given}."
            )
