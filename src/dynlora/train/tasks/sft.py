"""Set up TRL's `SFTTrainer`: a resumable order, metrics over all tokens, no side effects.

TRL's fused head computes token probabilities without the logits of all tokens in memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import EvalPrediction
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dynlora.errors import ConfigError
from dynlora.train.trainer import EpochSampler, JobTrainer, Penalty, check_finite


def written_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return loss, perplexity and accuracy over all tokens from the sums per row."""
    loss, right, count = np.asarray(prediction.predictions).sum(axis=0).tolist()
    mean = loss / max(count, 1)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),  # e^710 overflows
        "token_accuracy": right / max(count, 1),
    }


def divergence(model: Any, teacher: Any, inputs: Mapping[str, Any]) -> Float[Tensor, ""]:
    """Return the Kullback-Leibler divergence from the teacher's token probabilities, in nats.

    It is summed over the tokens with a label.
    """
    learned = inputs["labels"][:, 1:] != -100
    given = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
    with torch.no_grad():
        wanted = teacher(**given).logits[:, :-1][learned].float().log_softmax(dim=-1)
    found = model(**given).logits[:, :-1][learned].float().log_softmax(dim=-1)
    return kl_div(found, wanted, reduction="sum", log_target=True)


class SftJobTrainer(SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` with an explicit sampler, and evaluation without side effects."""

    _tag_names: ClassVar[list[str]] = []
    data_collator: Any
    evaluate = JobTrainer.evaluate
    _get_train_sampler = JobTrainer._get_train_sampler

    def __init__(
        self, sampler: EpochSampler, penalty: Penalty | None, teacher: Any = None, **kwargs: Any
    ) -> None:
        self.sampler = sampler
        self.penalty = penalty
        with unrounded(kwargs["model"]):
            super().__init__(**kwargs)
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the training loss of a batch plus the regulariser, if it is finite.

        It is TRL's loss, or with a teacher the mean divergence from its token probabilities.
        """
        loss: Tensor
        if self.teacher is None:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            # TRL's token count restarts at 0 when a run resumes.
            self._metrics["train"].pop("num_tokens", None)
        else:
            loss = divergence(model, self.teacher, inputs) / num_items_in_batch
            loss = loss * self.accelerator.num_processes  # over which gradients are averaged
        if self.penalty is not None:
            loss = loss + self.penalty() / self.current_gradient_accumulation_steps
        check_finite(loss, self.state.global_step)
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss of a batch, and the sums over tokens per row, twice for metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        # Loss, right predictions and tokens per row: 0 without a label.
        each = (-outputs.log_probs, outputs.is_top1, outputs.label_mask)
        rows = torch.stack([values.double().sum(dim=1) for values in each], dim=1)
        loss = rows[:, 0].sum() / rows[:, 2].sum().clamp(min=1)
        check_finite(loss, self.state.global_step)
        return loss, rows, rows

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return batches that are padded, so that processes count the rows of a last batch once."""
        collator = self.data_collator
        if isinstance(collator, DataCollatorForLanguageModeling):
            self.data_collator = replace(collator, padding_free=False)
        loader = super().get_eval_dataloader(*args, **kwargs)
        self.data_collator = collator
        return loader

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card."""

    def _send_telemetry(self) -> None:
        """Send nothing."""


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """Keep the trained parameters of a quantized model, which TRL rounds to bfloat16."""
    trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, before in trained:
        if parameter.dtype != before.dtype:
            # Those that got a checkpoint's rank meanwhile are zero.
            values = before if before.shape == parameter.shape else parameter.data
            parameter.data = values.to(parameter.device, before.dtype)


def trl_arguments(kind: Callable[..., Any], model: Any, **values: Any) -> Any:
    """Return TRL's arguments for a model whose head, which TRL reads directly, has no adapter."""
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in model.named_modules() if module is head)
        ending = name.rpartition(".")[2]
        raise ConfigError(
            f"`lora.target_modules` must leave out the language model head of this task, "
            f"got an adapter on {ending!r}, which TRL's loss would not see: remove it from the "
            f"list, or train it in full with `lora.modules_to_save: [{ending}]`."
        )
    return kind(max_length=None, **values)  # rows are truncated


def make_sft_trainer(values: dict[str, Any], processor: Any, **parts: Any) -> SftJobTrainer:
    """Return the Trainer of a model that writes text, for tokenized rows."""
    packed = "seq_lengths" in parts["train_dataset"].column_names
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": packed}
    args = trl_arguments(SFTConfig, parts["model"], **own | values)
    parts |= {"processing_class": processor, "compute_metrics": written_metrics}
    return SftJobTrainer(args=args, **parts)
