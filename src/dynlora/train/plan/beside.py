"""What a run takes beside its tensors: measured in short rehearsals, scaled by its batches."""

from dataclasses import replace

from dynlora.train.config import AdaLoraSettings, JobConfig, TrainingConfig
from dynlora.train.plan.batches import count_evaluation_shapes, count_shapes
from dynlora.train.plan.memory import Batches, Process
from dynlora.train.plan.rehearsal import Material, Rehearsal, rehearse
from dynlora.train.plan.script import Script, short_rows
from dynlora.train.task import TaskData
from dynlora.train.trainer import row_lengths


def describe_batches(data: TaskData, training: TrainingConfig, steps: int) -> Batches:
    """Return the sizes and numbers of shapes of a run's batches.

    Args:
        data: Both splits.
        training: How rows are put into batches.
        steps: Optimizer steps of the run.
    """
    train, validation = row_lengths(data.train), row_lengths(data.validation)
    return Batches(
        training=min(training.batch_size, len(train)),
        evaluation=min(training.eval_batch_size, len(validation)),
        training_shapes=count_shapes(train, training, steps),
        evaluation_shapes=count_evaluation_shapes(validation, training.eval_batch_size),
    )


def beside_tensors(
    small: Rehearsal, material: Material, config: JobConfig, batches: Batches
) -> Process:
    """Return what the process takes, and by how much it grows for what is new to it.

    Args:
        small: The first rehearsal in this process.
        material: Model and data.
        config: The job.
        batches: Those of the run.

    Raises:
        DynamicLoraError: As `rehearse`.
    """
    on_cpu = small.trace.device.type == "cpu"
    found = Process(
        base=small.process,
        loading=small.loading if on_cpu else 0,
        training_kernels=0,
        evaluation_kernels=0,
        adapter_kernels=0,
        rank_kernels=0,
    )
    if not (on_cpu and batches.differ):
        return found
    script = short_rows(material.data, batches.training, batches.evaluation)
    real = rehearse(material, config, script)
    found = replace(
        found,
        training_kernels=real.training_kernels,
        evaluation_kernels=real.evaluation_kernels,
    )
    return found if config.method == "full" else _with_ranks(found, material, config, script)


def _with_ranks(process: Process, material: Material, config: JobConfig, script: Script) -> Process:
    """Return by how much the process grows, too, if all layers take a rank that is new to it."""
    # Not every start can be had at every rank.
    higher = replace(config.lora, r=config.lora.r + 1, init_lora_weights=True)
    more = replace(config, method="lora", lora=higher, adalora=AdaLoraSettings())
    other = rehearse(material, more, script)
    shapes = {(group.in_features, group.out_features) for group in other.layers}
    return replace(
        process,
        adapter_kernels=min(other.training_kernels, process.training_kernels),
        rank_kernels=other.training_kernels // len(shapes),
    )


def without_adapters(process: Process) -> Process:
    """Return the same for a method that has no adapters."""
    return replace(process, training_kernels=process.training_kernels - process.adapter_kernels)
