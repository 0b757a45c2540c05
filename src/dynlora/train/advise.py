"""Advise on `lora.r` before a run: train a part of the job at `4 r`, once cut to `r` at half time.

Both runs of a pair are equal up to the cut, and see the same batches after it, so that most noise
cancels. Two runs from the start, at `r` and at `4 r`, differ by several times as much by chance.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
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

from dynlora.adapters.patterns import changes_base
from dynlora.config import DynamicLoraConfig
from dynlora.errors import ConfigError
from dynlora.train.build import JobInputs, build_trainer, load_inputs, prepare_method
from dynlora.train.config import JobConfig
from dynlora.train.machine import check_one_device, keep_freed_memory
from dynlora.train.methods.starts import begin_with_eva, uses_eva
from dynlora.train.plan import bare_job
from dynlora.train.trainer import SEARCH_ROWS, fixed_rows, rows_per_step

FACTOR = 4  # the compared ranks are `r` and this many times `r`
ENOUGH = 0.02  # `r` is enough if the higher rank lowers the loss by less than this part
SHARE, LEAST_SECONDS = 0.05, 120.0
"""Default time limit: this part of the job's time, but at least these seconds."""
MOST_SEEDS = 4
"""Most pairs of runs. Runs are so long that one pair fits into the time."""
PLANNED = 0.93
"""Part of the remaining time for which runs are planned, because they may turn out slower."""
PAIR = 1.5  # steps of a pair over those of a run: the first half is common
JUDGED = 0.05
"""Part of the time limit for an evaluation, whose rows take at most as long as those of steps."""
PROBED_STEPS, LEAST_PROBED, PROBE = 24, 6, 0.05
"""Most and fewest steps of a run that only measures time, and its part of the time limit."""
SMALLEST = 8  # the job's batches are divided by at most this number
FEWER = 0.75  # larger batches may reduce the number of steps to this part
LEAST_STEPS = 2  # fewest steps of a run, which is cut after half of them
GROUPS, LEAST_GROUPS = 50, 2  # most and fewest groups of validation rows, each with one loss
NOISE = 0.01
"""Expected standard deviation of a pair's relative gain, between seeds and from the gain of a run
at `r` from its start."""
CHANGE = 0.01  # expected standard deviation of the gain's change per doubling of the rows
FREEDOM = 5  # weight of both expectations in degrees of freedom
ABOVE = 0.975  # quantile at the upper end of a 95 % interval

Clock = Callable[[], float]
Losses = Float[np.ndarray, " groups"]
"""Contributions of groups of validation rows to the mean loss of a run."""
Pair = Float[np.ndarray, "2 groups"]  # losses of the cut run and of the other one


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Size of one run."""

    batch: int  # rows per optimizer step
    steps: int

    @property
    def rows(self) -> int:
        """Rows of all steps."""
        return self.batch * self.steps


class StepTimes(TrainerCallback):
    """Notes the time after each step, and stops training at the time limit."""

    def __init__(self, clock: Clock, end: float, least: int = 0) -> None:
        """Stop when `clock` passes `end`, but not before `least` steps."""
        self.clock, self.end, self.least = clock, end, least
        self.times: list[float] = []

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        """Note the time."""
        self.times.append(self.clock())
        control.should_training_stop |= self.is_over

    @property
    def is_over(self) -> bool:
        """Whether the time limit has passed."""
        return len(self.times) >= self.least and self.times[-1] > self.end


def advise_rank(
    config: JobConfig,
    console: Console,
    *,
    seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Train at four times `lora.r`, once cut to `lora.r` at half time, and compare the losses.

    Args:
        config: The job; nothing is written to its `output`.
        console: For one line per pair.
        seconds: Time limit; by default 5 % of the job's time, but at least two minutes.
        clock: Returns the time in seconds.

    Returns:
        JSON-ready values. `gain` is the part of the validation loss at `r` that the higher rank
        removes, `interval` its 95 % interval, and `learned` the part of the untrained model's loss
        that the cut run removes; all are null if no pair of runs fits into the time, or there
        are fewer than two validation rows.
        `verdict` is `enough` or `too low`, or `undecided` if the interval contains both, if there
        is no gain, or if the runs learned too little.

    Raises:
        DynamicLoraError: If model, data and configuration do not fit, or the job has no new adapter
            of rank `lora.r`.
    """
    began = clock()
    _check(config)
    inputs = load_inputs(config)
    validation_rows = len(inputs.data.validation)
    probe_seconds = PROBE * (LEAST_SECONDS if seconds is None else seconds)
    start, step_seconds = _probe(inputs, config, clock, probe_seconds)
    job = Size(batch=max(step_seconds), steps=inputs.steps)
    time_of_job = job.steps * step_seconds[job.batch]
    limit = max(LEAST_SECONDS, SHARE * time_of_job) if seconds is None else seconds
    judged = int(JUDGED * limit * job.batch / step_seconds[job.batch])
    validation = fixed_rows(inputs.data.validation, min(max(judged, GROUPS), SEARCH_ROWS))
    inputs = replace(inputs, data=replace(inputs.data, validation=validation))
    began_untrained = clock()
    bare = bare_job(config, 1)
    untrained = _losses(build_trainer(inputs, bare, prepare_method(inputs, bare), [])).sum()
    evaluation = clock() - began_untrained
    planned = PLANNED * (began + limit - clock()) - 2 * (start + evaluation)
    size = choose_size(planned / PAIR, job, step_seconds)
    pairs = list(_train_pairs(inputs, config, size, clock, began + limit, console))
    return {
        "r": config.lora.r,
        "higher_r": FACTOR * config.lora.r,
        **_verdict(
            pairs,
            untrained=float(untrained),
            change=CHANGE * math.log2(job.rows / size.rows),
            unseen=1 - len(inputs.data.validation) / validation_rows,
        ),
        "threshold": ENOUGH,
        "seeds": len(pairs),
        "steps": {"trained": size.steps, "job": job.steps},
        "batch": {"trained": size.batch, "job": job.batch},
        "rows": {
            "trained": _train_rows(inputs, config, size),
            "job": len(inputs.data.train),
            "validation": len(inputs.data.validation),
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
    if changes_base(config.lora.init_lora_weights):
        raise ConfigError(
            "`lora.init_lora_weights` must be an initialization that keeps the base weights, for "
            f"advice from runs that cut ranks, but got {config.lora.init_lora_weights}. Leave it "
            "out."
        )


def _probe(
    inputs: JobInputs, config: JobConfig, clock: Clock, seconds: float
) -> tuple[float, dict[int, float]]:
    """Return the seconds to prepare a run, and those per step with the job's and small batches."""
    full, start, step_seconds = rows_per_step(config.training, 1), 0.0, {}
    for batch in (full, -(-full // SMALLEST)):
        began = clock()
        timer = StepTimes(clock, began + seconds, LEAST_PROBED)
        size = Size(batch=batch, steps=PROBED_STEPS)
        _train(*_sized(inputs, config, size, config.training.seed), timer)
        middle = len(timer.times) // 2
        step = (timer.times[-1] - timer.times[middle - 1]) / (len(timer.times) - middle)
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
    steps = np.clip(seconds // each, min(LEAST_STEPS, job.steps), job.steps).astype(int)
    place = np.flatnonzero(steps >= FEWER * steps.max())[-1]
    return Size(batch=int(batches[place]), steps=int(steps[place]))


def _train_rows(inputs: JobInputs, config: JobConfig, size: Size) -> int:
    """Return the rows of a part in which a run sees each as often as the job."""
    rows = len(inputs.data.train)
    share = size.rows / (rows_per_step(config.training, 1) * inputs.steps)
    return min(rows, max(size.batch, round(rows * share)))


def _sized(
    inputs: JobInputs, config: JobConfig, size: Size, seed: int
) -> tuple[JobInputs, JobConfig]:
    """Return a run's inputs, with random rows of the seed, and its job of the higher rank."""
    train = fixed_rows(inputs.data.train, _train_rows(inputs, config, size), seed)
    inputs = replace(inputs, steps=size.steps, data=replace(inputs.data, train=train))
    passes = -(-size.batch // config.training.batch_size)
    bare = bare_job(config, size.steps)
    training = replace(
        bare.training,
        batch_size=-(-size.batch // passes),
        gradient_accumulation=passes,
        seed=seed,
    )
    lora = replace(config.lora, r=FACTOR * config.lora.r)
    return inputs, replace(bare, method="lora", lora=lora, training=training)


def _cut(config: JobConfig, half: int, steps: int) -> JobConfig:
    """Return the job of a run that is cut in the step after `half` of its steps."""
    place = min(1.0, (half + 1) / steps)
    dynamic = DynamicLoraConfig(
        importance="uniform",
        budget_end=1 / FACTOR,
        events=1,
        first_event=place,
        last_event=place,
    )
    return replace(config, method="dynamic", dynamic=dynamic)


def _train_pairs(
    inputs: JobInputs, config: JobConfig, size: Size, clock: Clock, end: float, console: Console
) -> Iterator[Pair]:
    """Yield the losses of both runs per seed, until the time is up."""
    longest = 0.0
    for seed in range(config.training.seed, config.training.seed + MOST_SEEDS):
        began, timer = clock(), StepTimes(clock, end)
        if began + longest > end or size.steps < LEAST_STEPS:
            return
        pair = _train_pair(*_sized(inputs, config, size, seed), timer)
        if pair is None:
            return
        cut, kept = pair.sum(axis=1)
        console.print(f"seed {seed}: validation loss {cut:.4f} and {kept:.4f}", highlight=False)
        yield pair
        longest = max(longest, clock() - began)


def _train_pair(inputs: JobInputs, config: JobConfig, timer: StepTimes) -> Pair | None:
    """Return the losses of a run that is cut at half time and of one that is not; None if late."""
    half = max(1, inputs.steps // 2)
    training = replace(config.training, save="steps", save_steps=half, save_total_limit=None)
    config = replace(config, training=training)
    with TemporaryDirectory() as folder:
        cut = _train(inputs, _cut(config, half, inputs.steps), timer, Path(folder))
        if timer.is_over:
            return None
        kept = _train(inputs, config, timer, Path(folder), half)
    return None if timer.is_over else np.stack([_losses(cut), _losses(kept)])


def _train(
    inputs: JobInputs, config: JobConfig, timer: StepTimes, folder: Path = Path(), done: int = 0
) -> Any:
    """Return the Trainer of a run after training, which may continue after `done` steps."""
    prepared = prepare_method(inputs, config)
    trainer = build_trainer(inputs, config, prepared, [timer], folder)
    if uses_eva(config.lora) and not done:
        begin_with_eva(trainer, prepared.model)
    set_seed(config.training.seed)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{done}") if done else None)
    return trainer


def _losses(trainer: Any) -> Losses:
    """Return the contribution of each group of validation rows to the mean loss."""
    rows = trainer.eval_dataset
    size = -(-len(rows) // GROUPS)
    trainer.args.per_device_eval_batch_size = min(size, trainer.args.per_device_eval_batch_size)
    trainer.model.eval()
    losses, labels = [], []
    for batch in trainer.get_eval_dataloader():
        counted = batch["labels"] if "labels" in batch else batch["input_ids"][:, 0]  # pairs
        labels.append(int((counted != -100).sum()))
        loss, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
        losses.append(float(loss))
    parts: Losses = np.array(losses) * np.array(labels) / sum(labels)
    return parts


def interval_of(
    drops: Float[np.ndarray, "seeds groups"], *, change: float, unseen: float
) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the mean gain.

    Three variances add up: of the mean over pairs, of the mean over groups of rows, and of the
    change from the part to the whole job. The first is a weighted mean of the measured variance and
    the expected one. Degrees of freedom are Satterthwaite's.

    Args:
        drops: Contributions of groups of validation rows to the relative gain of the higher rank,
            for at least one pair, and two groups.
        change: Expected standard deviation of the gain's change from the part to the whole job.
        unseen: Part of the validation rows that is not in the groups.
    """
    pairs, groups = drops.shape
    by_pair, by_group = drops.sum(axis=1), drops.mean(axis=0)
    gain = float(by_pair.mean())
    freedom = np.array([pairs - 1 + FREEDOM, groups - 1, FREEDOM])
    of_pairs = (np.square(by_pair - gain).sum() + FREEDOM * NOISE**2) / freedom[0]
    parts = np.array([of_pairs / pairs, unseen * groups * by_group.var(ddof=1), change**2])
    together = float(parts.sum() ** 2 / (parts**2 / freedom).sum())
    margin = float(student.ppf(ABOVE, together)) * math.sqrt(float(parts.sum()))
    return gain - margin, gain + margin


def verdict_of(low: float, high: float, learned: float) -> str:
    """Return the verdict from the interval of the gain, and the part of the loss removed."""
    if low < ENOUGH < high or learned <= ENOUGH:
        return "undecided"
    return "enough" if high <= ENOUGH else "too low"


def _verdict(
    pairs: Sequence[Pair], *, untrained: float, change: float, unseen: float
) -> dict[str, Any]:
    if not pairs or pairs[0].shape[1] < LEAST_GROUPS:
        empty = dict.fromkeys(("learned", "gain", "interval"))
        return {"verdict": "undecided", **empty, "gains": []}
    losses = np.stack(pairs)
    loss = losses[:, 0].sum(axis=1).mean()
    drops = (losses[:, 0] - losses[:, 1]) / loss
    low, high = interval_of(drops, change=change, unseen=unseen)
    learned = float(1 - loss / untrained)
    gain = float(drops.sum(axis=1).mean())
    return {
        "verdict": verdict_of(low, high, learned),
        "learned": learned,
        "gain": gain,
        "interval": [low, high],
        "gains": drops.sum(axis=1).tolist(),
    }
