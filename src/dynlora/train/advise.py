"""Advise on `lora.r` before a run: train a part of the job at `r` and at `4 r`, and compare.

Both runs of a pair have the same seed, rows and order of batches, so that most noise cancels. They
differ in `lora.r` alone. PEFT divides `lora_alpha` by it, so that the first updates of both outputs
are about equally large. With equal scales the higher rank learns faster, which looks like a need
for rank in a short run.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from scipy.stats import t as student
from transformers import TrainerCallback, set_seed
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from dynlora.errors import ConfigError
from dynlora.train.build import JobInputs, build_trainer, load_inputs, prepare_method
from dynlora.train.config import JobConfig
from dynlora.train.machine import check_one_device, keep_freed_memory
from dynlora.train.methods.starts import begin_with_eva, uses_eva
from dynlora.train.plan import bare_job

FACTOR = 4
"""The compared ranks are `r` and this many times `r`."""
ENOUGH = 0.02
"""`r` is enough if the higher rank lowers the loss by less than this part."""
SHARE, LEAST_SECONDS = 0.05, 120.0
"""Default time limit: this part of the job's time, but at least these seconds."""
LEAST_SEEDS, MOST_SEEDS = 2, 8
"""Seeds, of one pair of runs each. Runs are so long that the fewest seeds fit into the time."""
PLANNED = 0.85
"""Part of the remaining time for which runs are planned, because they may turn out slower."""
EVALUATION = 0.25
"""Time of an evaluation over that of a run's steps: half as many rows, without gradients."""
PROBED_STEPS = 6
"""Steps of a run that only measures the time of its later half."""
SMALLEST = 8
"""The job's batches are divided by at most this number."""
FEWER = 0.75
"""Larger batches may reduce the number of steps to this part."""
GROUPS, LEAST_GROUPS = 50, 2
"""Most and fewest groups of validation rows, each with one loss."""
NOISE, NOISE_FREEDOM = 0.02, 2
"""Expected standard deviation of a pair's relative gain, and its weight in degrees of freedom."""
CHANGE = 0.01
"""Expected standard deviation of the gain's change per doubling of the rows; same weight."""
ABOVE = 0.975
"""Quantile at the upper end of a 95 % interval."""

Clock = Callable[[], float]
Losses = Float[np.ndarray, " groups"]
"""Contributions of groups of validation rows to the mean loss of a run."""
Pair = Float[np.ndarray, "2 groups"]
"""Losses at the lower and the higher rank."""
Drops = Float[np.ndarray, "seeds groups"]
"""Contributions of groups of validation rows to the relative gain of the higher rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Size of one run."""

    batch: int
    """Rows per optimizer step."""
    steps: int

    @property
    def rows(self) -> int:
        """Rows of all steps."""
        return self.batch * self.steps


class StepTimes(TrainerCallback):
    """Notes the time after each step, and stops training at the time limit."""

    def __init__(self, clock: Clock, end: float) -> None:
        """Stop when `clock` passes `end`."""
        self.clock, self.end = clock, end
        self.times: list[float] = []

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Note the time."""
        self.times.append(self.clock())
        control.should_training_stop |= self.times[-1] > self.end


def advise_rank(
    config: JobConfig,
    console: Console,
    *,
    seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Train pairs of short runs at `lora.r` and at four times `lora.r`, and compare their losses.

    Args:
        config: The job; nothing is written to its `output`.
        console: For one line per pair.
        seconds: Time limit; by default 5 % of the job's time, but at least two minutes.
        clock: Returns the time in seconds.

    Returns:
        JSON-ready values. `gain` is the part of the validation loss at `r` that the higher rank
        removes, `interval` its 95 % interval, and `learned` the part of the untrained model's loss
        that a run at `r` removes; all are null if fewer than two seeds fit into the time, or
        there are fewer than two validation rows.
        `verdict` is `enough`, `too low` or `undecided`.

    Raises:
        DynamicLoraError: If model, data and configuration do not fit, or the job has no new adapter
            of rank `lora.r`.
    """
    began = clock()
    _check(config)
    inputs = load_inputs(config)
    start, step_seconds = _probe(inputs, config, clock)
    job = Size(batch=max(step_seconds), steps=inputs.steps)
    time_of_job = job.steps * step_seconds[job.batch]
    limit = max(LEAST_SECONDS, SHARE * time_of_job) if seconds is None else seconds
    planned = PLANNED * (began + limit - clock()) / (2 * LEAST_SEEDS)
    size = choose_size((planned - start) / (1 + EVALUATION), job, step_seconds)
    part = _part(inputs, config, size, config.training.seed)
    untrained = _untrained_loss(part, config)
    pairs = list(_train_pairs(inputs, config, size, clock, began + limit, console))
    return {
        "r": config.lora.r,
        "higher_r": FACTOR * config.lora.r,
        **_verdict(pairs, size, job, untrained),
        "threshold": ENOUGH,
        "seeds": len(pairs),
        "steps": {"trained": size.steps, "job": job.steps},
        "batch": {"trained": size.batch, "job": job.batch},
        "rows": {
            "trained": len(part.data.train),
            "job": len(inputs.data.train),
            "validation": len(part.data.validation),
        },
        "limit_seconds": limit,
        "seconds": clock() - began,
    }


def _check(config: JobConfig) -> None:
    check_one_device()
    if not torch.accelerator.is_available():
        keep_freed_memory()
    if config.method == "full":
        raise ConfigError(
            "`method` must have a rank for advice about it, but got full. Set `method: dynamic` or "
            "`method: lora`."
        )
    if config.lora.start_from is not None:
        raise ConfigError(
            "`lora.start_from` must be null for advice about the rank of a new adapter, but got "
            f"{config.lora.start_from}. Leave it out."
        )


def _batch(config: JobConfig) -> int:
    """Return the rows per optimizer step."""
    return config.training.batch_size * config.training.gradient_accumulation


def _probe(inputs: JobInputs, config: JobConfig, clock: Clock) -> tuple[float, dict[int, float]]:
    """Return the seconds to prepare a run, and the seconds per step with small and full batches."""
    step_seconds, start = {}, 0.0
    full = _batch(config)
    for batch in (full, -(-full // SMALLEST)):
        began, timer = clock(), StepTimes(clock, math.inf)
        size = Size(batch=batch, steps=PROBED_STEPS)
        part = _part(inputs, config, size, config.training.seed)
        _train(part, _sized(config, FACTOR * config.lora.r, size, config.training.seed), timer)
        middle = PROBED_STEPS // 2
        step = (timer.times[-1] - timer.times[middle - 1]) / (PROBED_STEPS - middle)
        start = max(timer.times[0] - began - step, 0.0)
        step_seconds[batch] = step
    return start, step_seconds


def choose_size(seconds: float, job: Size, step_seconds: Mapping[int, float]) -> Size:
    """Return the size of a run whose steps fit into `seconds`.

    Short runs are far from converged and say little about rank. So steps count before rows: the
    largest batch is chosen that costs at most a quarter of the possible steps.

    Args:
        seconds: Time for the steps.
        job: Size of the whole job, the largest one.
        step_seconds: Seconds per step by rows per step, for the smallest and largest batch; linear
            between them.
    """
    small, batches = min(step_seconds), np.arange(min(step_seconds), job.batch + 1)
    ends, times = [small, job.batch], [step_seconds[small], step_seconds[job.batch]]
    each = np.interp(batches, ends, times)
    steps = np.clip(seconds // each, 1, job.steps).astype(int)
    place = np.flatnonzero(steps >= FEWER * steps.max())[-1]
    return Size(batch=int(batches[place]), steps=int(steps[place]))


def _part(inputs: JobInputs, config: JobConfig, size: Size, seed: int) -> JobInputs:
    """Return random rows of the seed, seen as often as in the job, and fixed validation rows."""
    data = inputs.data
    share = size.rows / (_batch(config) * inputs.steps)
    rows = min(len(data.train), max(size.batch, round(len(data.train) * share)))
    judged = min(len(data.validation), max(GROUPS, size.rows // 2))
    data = replace(
        data,
        train=data.train.shuffle(seed=seed).select(range(rows)),
        validation=data.validation.shuffle(seed=0).select(range(judged)),
    )
    return replace(inputs, steps=size.steps, data=data)


def _sized(config: JobConfig, r: int, size: Size, seed: int) -> JobConfig:
    """Return the job at rank `r` for a run; `max_rank` stays the same multiple of it."""
    passes = -(-size.batch // config.training.batch_size)
    bare, most = bare_job(config, size.steps), config.dynamic.max_rank
    training = replace(
        bare.training,
        batch_size=-(-size.batch // passes),
        gradient_accumulation=passes,
        seed=seed,
    )
    most = most and most * r // config.lora.r
    dynamic = replace(bare.dynamic, max_rank=most)
    return replace(bare, lora=replace(config.lora, r=r), training=training, dynamic=dynamic)


def _train_pairs(
    inputs: JobInputs, config: JobConfig, size: Size, clock: Clock, end: float, console: Console
) -> Iterator[Pair]:
    """Yield the losses at both ranks per seed, until the time is up."""
    longest = 0.0
    for seed in range(config.training.seed, config.training.seed + MOST_SEEDS):
        began, timer = clock(), StepTimes(clock, end)
        if began + longest > end:
            return
        part, losses = _part(inputs, config, size, seed), []
        for r in (config.lora.r, FACTOR * config.lora.r):
            trainer = _train(part, _sized(config, r, size, seed), timer)
            if timer.times[-1] > end:
                return
            losses.append(_losses(trainer))
        lower, higher = (float(each.sum()) for each in losses)
        console.print(f"seed {seed}: validation loss {lower:.4f} and {higher:.4f}", highlight=False)
        yield np.stack(losses)
        longest = max(longest, clock() - began)


def _train(inputs: JobInputs, config: JobConfig, timer: StepTimes) -> Any:
    """Return the Trainer of a run after training."""
    prepared = prepare_method(inputs, config)
    trainer = build_trainer(inputs, config, prepared, [timer])
    if uses_eva(config.lora):
        begin_with_eva(trainer, prepared.model)
    set_seed(config.training.seed)
    trainer.train()
    return trainer


def _untrained_loss(inputs: JobInputs, config: JobConfig) -> float:
    config = bare_job(config, 1)
    trainer = build_trainer(inputs, config, prepare_method(inputs, config), [])
    return float(_losses(trainer).sum())


def _losses(trainer: Any) -> Losses:
    """Return the contribution of each group of validation rows to the mean loss."""
    rows = trainer.eval_dataset
    size = -(-len(rows) // GROUPS)
    trainer.args.per_device_eval_batch_size = min(size, trainer.args.per_device_eval_batch_size)
    trainer.model.eval()
    losses, labels = [], []
    for batch in trainer.get_eval_dataloader():
        labels.append(int((batch["labels"] != -100).sum()))
        loss, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
        losses.append(float(loss))
    parts: Losses = np.array(losses) * np.array(labels) / sum(labels)
    return parts


def interval_of(drops: Drops, change: float) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the mean gain.

    Three variances add up: of the mean over seeds, of the mean over groups of rows, and of the
    change from the part to the whole job. The first is a weighted mean of the measured variance,
    which few seeds determine badly, and the expected one. Degrees of freedom are Satterthwaite's.

    Args:
        drops: At least two seeds and groups.
        change: Expected standard deviation of the gain's change from the part to the whole job.
    """
    seeds, groups = drops.shape
    by_seed, by_group = drops.sum(axis=1), drops.mean(axis=0)
    freedom = np.array([seeds - 1 + NOISE_FREEDOM, groups - 1, NOISE_FREEDOM])
    of_seeds = ((seeds - 1) * by_seed.var(ddof=1) + NOISE_FREEDOM * NOISE**2) / freedom[0]
    parts = np.array([of_seeds / seeds, groups * by_group.var(ddof=1), change**2])
    together = float(parts.sum() ** 2 / (parts**2 / freedom).sum())
    margin = float(student.ppf(ABOVE, together)) * math.sqrt(float(parts.sum()))
    gain = float(by_seed.mean())
    return gain - margin, gain + margin


def _verdict(pairs: Sequence[Pair], size: Size, job: Size, untrained: float) -> dict[str, Any]:
    if len(pairs) < LEAST_SEEDS or pairs[0].shape[1] < LEAST_GROUPS:
        empty = dict.fromkeys(("learned", "gain", "interval"))
        return {"verdict": "undecided", **empty, "gains": []}
    losses = np.stack(pairs)
    loss = losses[:, 0].sum(axis=1).mean()
    drops = (losses[:, 0] - losses[:, 1]) / loss
    low, high = interval_of(drops, CHANGE * math.log2(job.rows / size.rows))
    learned = float(1 - loss / untrained)
    verdict = "too low" if low > ENOUGH else "enough" if high < ENOUGH else "undecided"
    return {
        "verdict": verdict if learned > ENOUGH else "undecided",
        "learned": learned,
        "gain": float(drops.sum(axis=1).mean()),
        "interval": [low, high],
        "gains": drops.sum(axis=1).tolist(),
    }
