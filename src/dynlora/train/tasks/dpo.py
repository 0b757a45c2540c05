"""DPO: prefer one of two answers (Rafailov et al. 2023, arXiv 2305.18290), by TRL's `DPOTrainer`.

The reference is the model without its adapter, also with `lora.start_from`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer
from trl.data_utils import common_prefix_length

from dynlora.train.config import METRICS, DataConfig
from dynlora.train.data.columns import check_column
from dynlora.train.data.conversations import check_template, read_conversations
from dynlora.train.data.splits import RawSplit
from dynlora.train.task import Predictor, Split
from dynlora.train.tasks.causal_lm import CAUSAL_LM, check_answers, check_left, encode
from dynlora.train.tasks.sft import SftJobTrainer, trl_arguments, unrounded
from dynlora.train.trainer import EpochSampler, JobTrainer, check_finite

ANSWERS = ("chosen", "rejected")


def _has_chats(split: RawSplit, column: str) -> bool:
    table = split.table
    return table.column_names.count(column) == 1 and bool(pa.types.is_nested(table[column].type))


def _keys(split: RawSplit, config: DataConfig, column: str) -> DataConfig:
    """Return the keys of `causal_lm` for rows with the answers of a column."""
    if _has_chats(split, column):
        return replace(config, messages=column, prompt=None, completion=None, as_chat=False)
    prompt = config.prompt or ("prompt" if "prompt" in split.table.column_names else None)
    return replace(config, text=column, prompt=prompt, completion=prompt and column)


def _encode(split: RawSplit, config: DataConfig, tokenizer: Any, column: str) -> Any:
    """Return the tokens per row of the prompt and the answer of a column, before truncation."""
    check_column(split, "task: dpo", column)
    if _has_chats(split, column):
        check_template(tokenizer, "task: dpo")
        rows = read_conversations(split, column)
        if any(row[0]["role"] == "assistant" for row in rows):  # without the prompt
            parts = (read_conversations(split, str(config.prompt or "prompt")), rows)
            joined = [[*prompt, *answer] for prompt, answer in zip(*parts, strict=True)]
            split = replace(split, table=pa.table({column: joined}))
    keys = _keys(split, config, column)
    check_answers(split, keys, tokenizer)
    return encode(split, keys, tokenizer)["input_ids"]


def _read_split(
    split: RawSplit, config: DataConfig, tokenizer: Any, _num_labels: int | None
) -> Split:
    rows, cut, limit = [], 0, config.max_length
    for pair in zip(*(_encode(split, config, tokenizer, name) for name in ANSWERS), strict=True):
        length = max(map(len, pair))
        chosen, rejected = (ids[:limit] for ids in pair)
        if chosen != rejected:
            cut += length > limit
            # The loss is about the difference of both answers: equal first tokens do not count.
            same = common_prefix_length(chosen, rejected)
            ids = {"chosen_ids": chosen[same:], "rejected_ids": rejected[same:]}
            rows.append({"prompt_ids": chosen[:same], **ids, "length": min(length, limit)})
    reason = f"within data.max_length={limit} tokens their 'chosen' is equal to 'rejected'"
    check_left(split, len(rows), reason)
    return Split(inputs=datasets.Dataset.from_list(rows), cut=cut, num_labels=None)


class DpoJobTrainer(DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` of tokenized rows; the rest is as in `SftJobTrainer`."""

    _tag_names: ClassVar[list[str]] = []
    create_model_card = SftJobTrainer.create_model_card
    evaluate = JobTrainer.evaluate
    _get_train_sampler = JobTrainer._get_train_sampler
    _send_telemetry = SftJobTrainer._send_telemetry

    def __init__(self, sampler: EpochSampler, penalty: None, *, model: Any, **kwargs: Any) -> None:
        self.sampler = sampler
        # TRL reads it in each step. In transformers 5.24 its name is deprecated.
        model.is_gradient_checkpointing = False
        with unrounded(model):
            super().__init__(model=model, **kwargs)
        # TRL's copy of a given adapter. Without it, the reference is the model without adapter.
        model.delete_adapter("ref")

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return TRL's loss of a batch, if it is finite."""
        loss: Tensor = super().compute_loss(*args, **kwargs)
        # TRL's token count restarts at 0 when a run resumes.
        self._metrics["train"].pop("num_tokens", None)
        check_finite(loss, self.state.global_step)
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss of a batch, and the metrics per pair, twice for their means."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**given, labels=labels, use_cache=False, fused_lm_head=True)
        reference = torch.cat(self.compute_ref_log_probs(model, inputs))
        chosen, rejected = (self.beta * (outputs.log_probs.sum(dim=1) - reference)).chunk(2)
        margins = (chosen - rejected).double()
        losses = -logsigmoid(margins)
        check_finite(losses.mean(), self.state.global_step)
        rows = torch.stack([margins > 0, margins, losses], dim=1)
        return losses.mean(), rows, rows

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # of tokens


def _make_trainer(values: dict[str, Any], tokenizer: Any, **parts: Any) -> DpoJobTrainer:
    return DpoJobTrainer(
        args=trl_arguments(DPOConfig, parts["model"], **values),
        processing_class=tokenizer,
        compute_metrics=lambda made: dict(
            zip(METRICS["dpo"], made.predictions.mean(axis=0), strict=True)
        ),
        **parts,
    )


def _predict(predictor: Predictor, split: RawSplit, config: DataConfig) -> Iterator[dict[str, Any]]:
    asked = str(config.prompt or "prompt")
    keys = _keys(split, config, asked if _has_chats(split, asked) else "chosen")
    if keys.messages is None:
        keys = replace(keys, prompt=keys.prompt or "prompt", completion="chosen")
    yield from CAUSAL_LM.predict(predictor, split, keys)


DPO = replace(
    CAUSAL_LM,
    read_split=_read_split,
    make_trainer=_make_trainer,
    own_values=lambda config: {"beta": config.dpo_beta},
    predict=_predict,
)
