"""Set up TRL's `SFTTrainer`: a resumable order, metrics over all tokens, no side effects.

TRL's fused head computes token probabilities without the logits of all tokens in memory.
"""

import math
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import kl_div
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dynlora.errors import ConfigError
from dynlora.train.trainer import EpochSampler, Penalty, check_finite


def token_sums(outputs: Any) -> Float[Tensor, "batch 3"]:
    """Return loss, right predictions and tokens per row from TRL's head: 0 without a label."""
    each = (-outputs.log_probs, outputs.is_top1, outputs.label_mask)
    return torch.stack([values.double().sum(dim=1) for values in each], dim=1)


def metrics_of(sums: Float[Tensor, " 3"]) -> dict[str, float]:
    """Return the metrics by name from the sums over all rows."""
    loss, right, count = sums.tolist()
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

    def __init__(
        self,
        sampler: EpochSampler,
        penalty: Penalty | None,
        teacher: Any = None,
        **kwargs: Any,
    ) -> None:
        self.sampler = sampler
        self.penalty = penalty
        self.sums = torch.zeros(3, dtype=torch.float64)
        trained = [(p, p.data) for p in kwargs["model"].parameters() if p.requires_grad]
        super().__init__(**kwargs)
        # TRL rounds trained parameters of a quantized model to bfloat16. Those that got a
        # checkpoint's rank meanwhile are zero.
        for parameter, before in trained:
            if parameter.dtype != before.dtype:
                values = before if before.shape == parameter.shape else parameter.data
                parameter.data = values.to(parameter.device, before.dtype)
        self.teacher = teacher
        if teacher is not None:
            teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(
        self,
        model: Any,
        inputs: MutableMapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
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
        self,
        model: Any,
        inputs: MutableMapping[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Return the mean evaluation loss of a batch, and add its tokens to the sums."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        rows = token_sums(outputs)
        loss = rows[:, 0].sum() / rows[:, 2].sum().clamp(min=1)
        check_finite(loss, self.state.global_step)
        self.sums += self.accelerator.gather_for_metrics(rows).sum(dim=0).to(self.sums)
        return loss, None, None

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return batches that are padded, so that processes count the rows of a last batch once."""
        collator = self.data_collator
        if isinstance(collator, DataCollatorForLanguageModeling):
            self.data_collator = replace(collator, padding_free=False)
        loader = super().get_eval_dataloader(*args, **kwargs)
        self.data_collator = collator
        return loader

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate, and replace the Trainer's means over batches by metrics over all tokens."""
        self.sums.zero_()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in metrics_of(self.sums).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without changing torch's random state, as in `JobTrainer`."""
        with torch.random.fork_rng():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return self.sampler

    def _send_telemetry(self) -> None:
        """Send nothing."""


def make_sft_trainer(values: dict[str, Any], processor: Any, **parts: Any) -> SftJobTrainer:
    """Return the Trainer of a model that writes text."""
    # TRL's loss reads the head's weight directly.
    model = parts["model"]
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        name = next(name for name, module in model.named_modules() if module is head)
        ending = name.rpartition(".")[2]
        raise ConfigError(
            f"`lora.target_modules` must leave out the language model head of this task, "
            f"got an adapter on {ending!r}, which TRL's loss would not see: remove it from the "
            f"list, or train it in full with `lora.modules_to_save: [{ending}]`."
        )
    # For tokenized and truncated rows.
    packed = "seq_lengths" in parts["train_dataset"].column_names
    own = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "packing": packed}
    with warnings.catch_warnings():
        # TRL sets a name that is deprecated in transformers 5.24.
        warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
        args = SFTConfig(**own | values)
    return SftJobTrainer(args=args, processing_class=processor, **parts)
