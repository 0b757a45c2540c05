"""TRL's `SFTTrainer` as a job sets it up: an order that resumes, honest sums, no side effects.

What TRL adds is the loss: its language model head computes a token's probability without keeping
the logits of all tokens in memory. Rows reach it as tokens; it writes no card and sends nothing.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from dynlora.errors import ConfigError
from dynlora.train.loss import Penalty, check_finite
from dynlora.train.task import TrainerParts
from dynlora.train.trainer import (
    EpochSampler,
    argument_values,
    make_sampler,
    row_lengths,
    without_trace,
)


@dataclass(slots=True)
class TokenSums:
    """Sums over the tokens of an evaluation, so that batches and padding do not matter."""

    loss: float = 0.0
    right: int = 0
    """Tokens that were the likeliest."""
    count: int = 0

    def add(self, outputs: Any) -> Tensor:
        """Add a batch and return its mean loss.

        Args:
            outputs: Of TRL's head, whose values are 0 where there is no label.
        """
        losses = -outputs.log_probs.double()
        count = int(outputs.label_mask.sum())
        self.loss += float(losses.sum())
        self.right += int(outputs.is_top1.sum())
        self.count += count
        mean: Tensor = losses.sum() / max(count, 1)
        return mean

    def metrics(self) -> dict[str, float]:
        """Return the metrics by name."""
        mean = self.loss / max(self.count, 1)
        return {
            "loss": mean,
            "perplexity": math.exp(min(mean, 700.0)),  # e^710 is more than a float can hold
            "token_accuracy": self.right / max(self.count, 1),
        }


class SftJobTrainer(SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` with a given order of examples, and evaluation without side effect."""

    _tag_names: ClassVar[list[str]] = []

    def __init__(self, sampler: EpochSampler, penalty: Penalty | None, **kwargs: Any) -> None:
        """Take the order and the regulariser; everything else goes to the SFTTrainer."""
        self.sampler = sampler
        self.penalty = penalty
        self.sums = TokenSums()
        trained = [(p, p.data) for p in kwargs["model"].parameters() if p.requires_grad]
        super().__init__(**kwargs)
        # On a quantized model TRL rounds what is trained to bfloat16.
        for parameter, before in trained:
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Return TRL's loss of a batch in training, and the regulariser as a term of its own.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        loss: Tensor = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        # TRL begins to count at 0 when a run resumes.
        self._metrics["train"].pop("num_tokens", None)
        if self.penalty is not None:
            loss = loss + self.penalty() / self.current_gradient_accumulation_steps
        check_finite(loss, self.state.global_step)
        return loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the mean loss of a batch in evaluation, and add its tokens to the sums.

        Raises:
            NonFiniteError: If the loss is NaN or infinite.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        loss = self.sums.add(outputs)
        check_finite(loss, self.state.global_step)
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, with metrics over all tokens where the Trainer's are means over batches."""
        self.sums = TokenSums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self.sums.metrics().items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without a trace in torch's random state (see `without_trace`)."""
        with without_trace():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def _send_telemetry(self) -> None:
        """Send nothing."""


def make_sft_trainer(parts: TrainerParts) -> SftJobTrainer:
    """Return the Trainer of a causal language model.

    Raises:
        ConfigError: If the adapter covers the language model head.
    """
    _check_head(parts.model)
    return SftJobTrainer(
        make_sampler(row_lengths(parts.data.train), parts.training),
        parts.penalty,
        model=parts.model,
        args=_arguments(parts),
        train_dataset=parts.data.train,
        eval_dataset=parts.data.validation,
        processing_class=parts.processor,
        callbacks=list(parts.callbacks),
        optimizers=(parts.optimizer, None),
    )


def _arguments(parts: TrainerParts) -> SFTConfig:
    """Return TRL's arguments: rows come as tokens, already cut, and activations are kept."""
    own = {
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": False,
    }
    with warnings.catch_warnings():
        # TRL switches it on by this name, which transformers 5.24 calls an old one.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        return SFTConfig(**own | argument_values(parts))


def _check_head(model: Any) -> None:
    """Check that no adapter is on the head, whose weight TRL's loss reads directly.

    Raises:
        ConfigError: If one is.
    """
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in model.named_modules() if module is head)
        ending = name.rpartition(".")[2]
        raise ConfigError(
            f"`lora.target_modules` must leave out the language model head with `task: causal_lm`, "
            f"got an adapter on {ending!r}, which TRL's loss would not see: remove it from the "
            f"list, or train it in full with `lora.modules_to_save: [{ending}]`."
        )
