"""Two real optimizer steps of one method on batches of a few rows, with every allocation noted."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from dynlora.train.config import METRICS, JobConfig
from dynlora.train.methods import Prepared, prepare
from dynlora.train.optimizer import make_optimizer
from dynlora.train.plan.layers import LayerGroup, RankRoom, group_layers, plan_ranks
from dynlora.train.plan.process import (
    forget_peak,
    process_bytes,
    release_free_memory,
)
from dynlora.train.plan.script import Script
from dynlora.train.plan.trace import AllocationTrace, storage_bytes
from dynlora.train.pretrained import Source
from dynlora.train.run_record import peak_resident
from dynlora.train.task import Task, TaskData, TrainerParts

STEPS = 2
"""In the first the optimizer has no state yet; from the second on all is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What every method's rehearsal begins with."""

    task: Task
    source: Source
    processor: Any
    data: TaskData
    steps: int
    """Optimizer steps of the whole run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What two steps of a method showed."""

    budget: int
    """Parameters that the method may use for what it adds."""
    start: int
    """Parameters of that kind at the start."""
    trainable: int
    """Parameters that are trained."""
    total: int
    """Parameters of the model with what the method adds."""
    layers: Sequence[LayerGroup]
    """Layers with an adapter."""
    ranks: RankRoom | None
    """How ranks will move; None where they do not."""
    weights: int
    """Bytes of the model's parameters and buffers."""
    gradients: int
    """Bytes of the gradients of what is trained."""
    optimizer: int
    """Bytes of the optimizer's state."""
    trace: AllocationTrace
    process: int
    """Bytes of this process without tensors: the more of before and after the rehearsal."""
    loading: int
    """Most bytes of this process while the model was loaded and made ready."""
    evaluation_kernels: int
    """Bytes by which it grew for the one shape of an evaluation's batch."""
    training_kernels: int
    """Bytes by which it grew for each shape of a training batch."""


class _Phases(TrainerCallback):
    """Tells a trace which step begins, and ends training after `STEPS`."""

    def __init__(self, trace: AllocationTrace) -> None:
        self.trace = trace

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trace.begin(f"step {state.global_step + 1}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = state.global_step >= STEPS


def rehearse(material: Material, config: JobConfig, script: Script) -> Rehearsal:
    """Evaluate, train for up to two steps and tell what was seen; nothing is written.

    Forwards are not fused: which tensors a fused one makes depends on the number of rows, so that
    two rehearsals would not tell of a third size; what it takes is no more.

    Args:
        material: Model and data.
        config: The job, with the method that is meant.
        script: Its batches.

    Raises:
        DynamicLoraError: If the method does not fit the model or the configuration.
    """
    config = replace(config, dynamic=replace(config.dynamic, fused=False))
    forget_peak()
    set_seed(config.training.seed)
    base = material.task.load_model(material.source, material.data.num_labels, material.processor)
    set_seed(config.training.seed)
    prepared = prepare(base, config, material.steps)
    model = prepared.model
    layers = group_layers(model)
    ranks = None
    if prepared.dynamic is not None:
        ranks = plan_ranks(model, config.dynamic, model.peft_config["default"].r, material.steps)
    trainer = _make_trainer(material, config, script, prepared)
    held = [*model.parameters(), *model.buffers()]
    trace = AllocationTrace(trainer.args.device, held)
    trainer.add_callback(_Phases(trace))
    trainer.data_collator = _unseen(trainer.data_collator, trace)
    loading = peak_resident()
    # What is free within the heap at first stays there in a run, so it is not released yet.
    process = [process_bytes(held, trace)]
    release_free_memory()
    process.append(process_bytes(held, trace))
    for phase, act in (("evaluation", trainer.evaluate), ("training", trainer.train)):
        with trace:
            trace.begin(phase)
            act()
        release_free_memory()
        process.append(process_bytes(held, trace))
    trace.end()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Rehearsal(
        budget=prepared.budget,
        start=prepared.start_parameters,
        trainable=sum(parameter.numel() for parameter in trained),
        total=sum(parameter.numel() for parameter in model.parameters()),
        layers=layers,
        ranks=ranks,
        weights=storage_bytes(held),
        gradients=storage_bytes(trained),
        optimizer=storage_bytes(_state(trainer)),
        trace=trace,
        process=max(process),
        loading=loading,
        evaluation_kernels=max(process[2] - process[1], 0),
        training_kernels=max(process[3] - process[2], 0) // script.shapes,
    )


def _make_trainer(
    material: Material, config: JobConfig, script: Script, prepared: Prepared
) -> Trainer:
    batches = min(config.training.gradient_accumulation, 2)  # the second finds gradients there
    training = replace(
        config.training,
        max_steps=material.steps,
        batch_size=len(script.first),
        eval_batch_size=len(script.evaluation),
        gradient_accumulation=batches,
        eval="no",
        save="no",
        load_best_model_at_end=False,
        early_stopping_patience=None,
        report_to=(),
        resume="none",
    )
    data = replace(
        material.data,
        train=material.data.train.select(script.first * batches + script.later * batches),
        validation=material.data.validation.select(script.evaluation),
    )
    # The Trainer makes its folder at once; nothing is written into it.
    with TemporaryDirectory() as nowhere:
        parts = TrainerParts(
            model=prepared.model,
            training=training,
            best_metric=METRICS[config.task][0],
            checkpoints=Path(nowhere),
            data=data,
            processor=material.processor,
            penalty=prepared.penalty,
            callbacks=prepared.callbacks,
            optimizer=make_optimizer(prepared.model, training),
        )
        trainer = material.task.make_trainer(parts)
    trainer.remove_callback(PrinterCallback)
    in_order = SequentialSampler(data.train)
    trainer._get_train_sampler = lambda *_: in_order  # type: ignore[method-assign]
    return trainer


def _unseen(collator: Any, trace: AllocationTrace) -> Callable[[list[Any]], Any]:
    """Return what makes batches unseen: some collators do so with a tensor for each row."""

    def collate(rows: list[Any]) -> Any:
        with trace.pause():
            return collator(rows)

    return collate


def _state(trainer: Trainer) -> Iterator[Tensor]:
    assert trainer.optimizer is not None
    for state in trainer.optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))
