"""The order of examples, the number of steps, and the precision."""

import math
from dataclasses import replace

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.modeling_outputs import Seq2SeqSequenceClassifierOutput

from dynlora.train.config import TrainingConfig
from dynlora.train.trainer import (
    EpochSampler,
    argument_values,
    make_job_trainer,
    make_sampler,
    row_lengths,
    total_steps,
    use_bf16,
)


def values(config, folder):
    return argument_values(config, "accuracy", folder)


LENGTHS = [1 + (7 * n) % 50 for n in range(103)]


@pytest.mark.parametrize("batch_size", [None, 8])
def test_each_epoch_has_every_example_in_an_order_of_seed_and_epoch_alone(batch_size):
    def order(seed, epoch):
        sampler = EpochSampler(LENGTHS, batch_size=batch_size, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    before = torch.get_rng_state()
    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert torch.equal(torch.get_rng_state(), before)
    assert all(sorted(found) == list(range(103)) for found in orders.values())
    torch.manual_seed(99)
    assert all(order(*key) == value for key, value in orders.items())
    assert len({tuple(value) for value in orders.values()}) == 4


def test_a_batch_of_a_small_data_set_has_other_texts_in_each_epoch():
    sampler, seen = EpochSampler(range(1, 105), batch_size=8, seed=0), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        seen += [frozenset(order[at : at + 8]) for at in range(0, 104, 8)]
    assert len(set(seen)) == len(seen)


def test_grouping_puts_texts_of_like_length_into_a_batch():
    def padding(batch_size):
        order = list(EpochSampler(LENGTHS, batch_size=batch_size, seed=0))
        batches = [[LENGTHS[i] for i in order[at : at + 8]] for at in range(0, 103, 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(8) < 0.5 * padding(None)
    config = TrainingConfig(batch_size=4, gradient_accumulation=2)
    assert make_sampler(LENGTHS, config).batch_size == 8, "the batches of a step are one group"
    assert make_sampler(LENGTHS, TrainingConfig(group_by_length=False)).batch_size is None


def test_rows_are_as_long_as_their_tokens_and_images_all_alike():
    tokens = datasets.Dataset.from_dict({"input_ids": [[5], [5, 6, 7]], "labels": [0, 1]})
    assert row_lengths(tokens) == [1, 3]
    assert row_lengths(datasets.Dataset.from_dict({"image": [b"a", b"bc"]})) == [1, 1]


@pytest.mark.parametrize(
    ("batch", "accumulation", "epochs"), [(1, 1, 0.5), (8, 3, 1.0), (1, 3, 2.5), (8, 1, 2.5)]
)
def test_steps_are_counted_as_the_trainer_counts_them(tmp_path, batch, accumulation, epochs):
    config = TrainingConfig(
        batch_size=batch, gradient_accumulation=accumulation, epochs=epochs, bf16=False, eval="no"
    )
    for rows in (1, 7, 8, 9, 100):
        data = datasets.Dataset.from_dict({"input": [0.0] * rows})
        args = TrainingArguments(**values(config, tmp_path))
        trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=data)
        loader = trainer.get_train_dataloader()
        expected = trainer.set_initial_training_values(trainer.args, loader)[-1]
        assert total_steps(rows, config) == expected
        shard = BatchSamplerShard(BatchSampler(range(rows), batch, drop_last=False), 2, 0)
        per_epoch = math.ceil(len(shard) / accumulation)
        assert total_steps(rows, config, 2) == max(1, math.ceil(epochs * per_epoch))
    assert total_steps(1000, replace(config, max_steps=3)) == 3


def test_the_trainers_arguments_are_those_of_the_configuration(tmp_path):
    config = TrainingConfig(
        epochs=2, batch_size=3, learning_rate=0.25, weight_decay=0.5, warmup_ratio=0.125,
        schedule="constant", max_grad_norm=0, bf16=False, eval="steps", eval_steps=7, save="no",
        logging_steps=9, seed=11,
    )  # fmt: skip
    args = TrainingArguments(**values(config, tmp_path))
    assert (args.num_train_epochs, args.max_steps) == (2, -1)
    assert (args.per_device_train_batch_size, args.learning_rate) == (3, 0.25)
    assert (args.weight_decay, args.max_grad_norm, args.seed) == (0.5, 0, 11)
    assert args.lr_scheduler_type == "constant_with_warmup"
    assert args.get_warmup_steps(80) == 10
    assert (args.eval_strategy, args.eval_steps, args.save_strategy) == ("steps", 7, "no")
    assert args.optim.startswith("adamw_torch")
    assert args.report_to == []
    for choice in (True, False):
        assert values(replace(config, bf16=choice), tmp_path)["bf16"] is choice
    assert use_bf16("auto") in {True, False}
    assert not list(tmp_path.iterdir())


def test_of_a_model_that_says_more_than_logits_these_alone_are_measured(tmp_path):
    class Talkative(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            logits = torch.stack([x, -x], dim=1) + self.weight
            hidden = torch.zeros(len(x), 3, 4)
            return Seq2SeqSequenceClassifierOutput(logits=logits, encoder_last_hidden_state=hidden)

    rows = datasets.Dataset.from_dict({"x": [1.0, 2.0, 3.0], "labels": [0, 1, 0]})
    trainer = make_job_trainer(
        values(TrainingConfig(bf16=False), tmp_path),
        None,
        sampler=EpochSampler([1, 1, 1], batch_size=None, seed=0),
        penalty=None,
        model=Talkative(),
        train_dataset=rows,
        eval_dataset=rows,
        loss=lambda logits, labels: cross_entropy(logits, labels, reduction="sum"),
        metrics=lambda prediction: {"accuracy": prediction.predictions.shape[1] - 1},
        collate=lambda _: default_data_collator,
    )
    assert trainer.predict(rows).predictions.tolist() == [[1, -1], [2, -2], [3, -3]]


@pytest.mark.parametrize(("found", "on_cpu"), [(None, True), ("mps", True), ("cuda", False)])
def test_a_gpu_that_has_float64_trains(tmp_path, monkeypatch, found, on_cpu):
    device = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
    assert values(TrainingConfig(bf16=False), tmp_path)["use_cpu"] is on_cpu
