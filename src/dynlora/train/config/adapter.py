"""Sections `lora` and `adalora`: the adapter, in PEFT's words."""

from dataclasses import dataclass
from typing import Literal

from dynlora.adapters.patterns import changes_base
from dynlora.errors import ConfigError
from dynlora.train.config.checks import require


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
    modules_to_save: tuple[str, ...] = ()
    """Endings of module names to train in full and save beside the adapter, such as
    `[embed_tokens]`; a task's new head is one in any case. [modules_to_save]"""
    use_rslora: bool = False
    """Divide `lora_alpha` by the square root of `r` instead of by `r`. [use_rslora]"""
    use_dora: bool = False
    """DoRA: learn the length of each column of the weight beside its direction, with
    `method: lora`. Adds one parameter for each output of a layer. [use_dora]"""
    init_lora_weights: (
        Literal[
            "gaussian", "orthogonal", "eva", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"
        ]
        | bool
    ) = True
    """How a new adapter begins: true is PEFT's default; `eva` takes directions of the training
    data's inputs; `pissa` and `olora` take a part of the base model's weights and give it back when
    the adapter is saved, which doubles its rank. [init_lora_weights]"""
    start_from: str | None = None
    """Folder of a trained LoRA adapter of this base model to go on from: its ranks, scales,
    targets and modules to save are kept. The other keys of this section have no effect, but for
    `r` with `method: dynamic`: above the adapter's own it raises the budget."""

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            ConfigError: If a value is outside its range, or two do not fit together.
        """
        require(self.r >= 1, "lora.r", "at least 1", self.r)
        require(self.lora_alpha > 0, "lora.lora_alpha", "above 0", self.lora_alpha)
        require(0 <= self.lora_dropout < 1, "lora.lora_dropout", "in [0, 1)", self.lora_dropout)
        require(len(self.target_modules) > 0, "lora.target_modules", "not empty", "[]")
        self._check_start()

    def _check_start(self) -> None:
        start = self.init_lora_weights
        if start is False:
            raise ConfigError(
                "`lora.init_lora_weights` must leave the model as it is, got false, with which it "
                "begins with random changes: use true, or the name of another start."
            )
        if start == "orthogonal" and self.r % 2:
            raise ConfigError(
                f"`lora.r` must be even with `lora.init_lora_weights: orthogonal`, got {self.r}: "
                f"use {self.r + 1}, or another start."
            )
        if changes_base(start) and self.use_dora:
            raise ConfigError(
                f"`lora.init_lora_weights` must leave the base model's weights alone with "
                f"`lora.use_dora: true`, got {start}: DoRA's lengths are those of the whole "
                "weight. Use true, or leave `use_dora: false`."
            )


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
        require(0 <= first < 1, "adalora.initial_fraction", "in [0, 1)", first)
        require(0 <= last < 1 - first, "adalora.final_fraction", f"in [0, {1 - first:g})", last)
        require(self.interval >= 1, "adalora.interval", "at least 1", self.interval)
        weight = self.orth_reg_weight
        require(weight >= 0, "adalora.orth_reg_weight", "at least 0", weight)
