r"""Time a training step of dynlora and of PEFT: all variants in one process, one step each in turn.

    python -m benchmarks.costs.speed --model minilm --batch 32 --tokens 64 --rank 8
    python -m benchmarks.costs.speed --model llama-8b --batch 4 --tokens 512 --rank 16 \
        --dtype bfloat16 --device cuda

Models are real ones from PyPI packages, or large random ones for a GPU, without full fine-tuning
(`benchmarks/costs/speed_models.py`). Tokens are random, without padding. First, outputs and
gradients of the fused model are compared with PEFT's. A step is forward, backward, clipping and the
`Trainer`'s fused AdamW; for `frozen` it is forward and backward to the embedded input. `dynamic`
uses random scores, so that ranks move and differ. Separate processes, which load the model and take
six steps, measure peak memory. They also time LoRA, AdaLoRA and dynlora three times each, without
and with the memory setting of `dynlora train`.

Writes `benchmarks/results/speed-MODEL-BATCHxTOKENS-rRANK-DTYPE.json` for
`python -m benchmarks.costs.speed_report`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.costs.speed_models import MODELS, Shape, load_base
from dynlora import DynamicLora, DynamicLoraConfig, FusedLora
from dynlora.train.machine import keep_freed_memory

VARIANTS = (
    "frozen", "lora", "adalora", "dora", "full", "fused", "dynamic", "dynamic_unfused",
)  # fmt: skip
RARE, SPACING = ("adalora", "dora", "full", "dynamic_unfused"), 4
"""Variants that take a step in every fourth round only."""
WARM_UP = 4
ALONE_STEPS, PROCESSES = 6, 3
ALONE = ("lora", "adalora", "dynamic")
"""Variants timed in separate processes."""
DTYPES = ("float32", "bfloat16")
TOLERANCE = 5e-5
"""Maximum difference between the relative errors of fused LoRA and of PEFT in the same dtype: the
float32 rounding errors of all layers."""


def main() -> None:
    """Check, time, and write the result."""
    options = _options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.alone is not None:
        if options.keep:
            keep_freed_memory()
        run = _Run(options.alone, options)
        for _ in range(ALONE_STEPS):
            run.step()
        print(json.dumps({"peak": _peak(options.device), "seconds": run.seconds[2:]}))
        return
    errors = _compare(options)
    # A shape's variants have the same weights in memory, which full fine-tuning would change.
    shaped = isinstance(MODELS[options.model], Shape)
    variants = [name for name in VARIANTS if not (shaped and name == "full")]
    runs = {name: _Run(name, options) for name in variants}
    for number in range(WARM_UP + options.steps):
        now = [n for n in variants if n not in RARE or number % SPACING == 0]
        for place in range(len(now)):
            runs[now[(number + place) % len(now)]].step()
    result = {
        "model": options.model,
        "batch": options.batch,
        "tokens": options.tokens,
        "rank": options.rank,
        "dtype": options.dtype,
        "device": _named(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "errors": errors,
        "events": len(runs["dynamic"].events),
        "seconds_per_event": median(runs["dynamic"].events),
        "dynamic_part": runs["dynamic"].booked / sum(runs["dynamic"].seconds),
        "peak_bytes": {name: _alone(name)["peak"] for name in variants},
        "alone": _in_processes_of_their_own(),
        "seconds": {
            name: [round(second, 5) for second in run.seconds[_steps_of(name, WARM_UP) :]]
            for name, run in runs.items()
        },
    }
    name = f"{options.model}-{options.batch}x{options.tokens}-r{options.rank}-{options.dtype}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"speed-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for each, seconds in result["seconds"].items():
        share = median(ratios(result["seconds"], each))
        print(f"{each:16} {median(seconds):.3f} s, {share:.3f} of PEFT LoRA")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="of a shape: fewer than it has, for a trial")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--alone", choices=VARIANTS, help="time this one, and print its peak memory"
    )
    parser.add_argument("--keep", action="store_true", help="keep freed memory; with --alone")
    return parser.parse_args()


def _steps_of(name: str, rounds: int) -> int:
    return ceil(rounds / SPACING) if name in RARE else rounds


def ratios(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Return a variant's step times over those of PEFT LoRA in the same rounds."""
    spacing = len(seconds["lora"]) // len(seconds[name])
    return [a / b for a, b in zip(seconds[name], seconds["lora"][::spacing], strict=True)]


def _alone(name: str, *given: str) -> dict[str, Any]:
    """Return peak memory and seconds of a variant in a separate process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.costs.speed", *sys.argv[1:]]
    found = subprocess.run(
        [*command, "--alone", name, *given], check=True, capture_output=True, text=True
    ).stdout
    result: dict[str, Any] = json.loads(found.splitlines()[-1])
    return result


def _in_processes_of_their_own() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return peaks and seconds by memory setting and variant; the processes take turns."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        setting: {name: [] for name in ALONE} for setting in ("plain", "kept")
    }
    for _ in range(PROCESSES):
        for setting, runs in found.items():
            for name in ALONE:
                runs[name].append(_alone(name, *(["--keep"] if setting == "kept" else [])))
    return found


def _named(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def _peak(device: str) -> int:
    """Return the peak of memory on the device, in bytes.

    On the CPU of this process: `getrusage` would tell the peak of the one that started it, too.
    """
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


class _Run:
    """One variant: its model, its optimizer, and the seconds of its steps."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.seconds: list[float] = []
        self.events: list[float] = []
        """Seconds of each event."""
        self._options = options
        rounds = WARM_UP + options.steps
        self._steps = ALONE_STEPS if options.alone else _steps_of(name, rounds)
        self.model = _model(name, options, self._steps)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = AdamW(self._trained, lr=1e-4, fused=True) if self._trained else None
        self._batch = _batch(self.model, options)
        self._dynamic: DynamicLora | None = None
        self._adalora = self.model.base_model if name == "adalora" else None
        if name == "fused":
            FusedLora(self.model)
        elif name.startswith("dynamic"):
            config = DynamicLoraConfig(
                importance="random", total_steps=self._steps, fused=name == "dynamic"
            )
            assert self._optimizer is not None
            self._dynamic = DynamicLora(self.model, self._optimizer, config)

    @property
    def booked(self) -> float:
        """Seconds that the controller measured for itself."""
        return 0.0 if self._dynamic is None else self._dynamic.seconds

    def step(self) -> None:
        """Take one step, timed."""
        start = self._now()
        self._forward_and_backward()
        if self._optimizer is not None:
            nn.utils.clip_grad_norm_(self._trained, 1.0)
            if self._dynamic is not None:
                self._dynamic.observe()
            self._optimizer.step()
            if self._adalora is not None:
                self._adalora.update_and_allocate(len(self.seconds))
            if self._dynamic is not None:
                self._count(self._dynamic)
            self._optimizer.zero_grad()
        self.seconds.append(self._now() - start)

    def _now(self) -> float:
        """Return the time after the device has finished."""
        if self._options.device != "cpu":
            torch.cuda.synchronize(self._options.device)
        return time.perf_counter()

    def _forward_and_backward(self) -> None:
        bf16 = self._options.dtype == "bfloat16"
        with torch.autocast(self._options.device, torch.bfloat16, enabled=bf16):
            loss: Tensor = self.model(**self._batch).loss
        loss.backward()

    def _count(self, dynamic: DynamicLora) -> None:
        events, before = len(dynamic.history), self._now()
        dynamic.step()
        if len(dynamic.history) > events:
            self.events.append(self._now() - before)


def _model(name: str, options: argparse.Namespace, steps: int) -> Any:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    base = load_base(options.model, dtype, device=options.device, layers=options.layers)
    torch.manual_seed(0)  # a cached shape uses no random numbers
    if name == "full":
        return base.train()
    if name == "frozen":
        for weight in base.parameters():
            weight.requires_grad_(False)
        base.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
        return base.train()
    timed = MODELS[options.model]
    shared: dict[str, Any] = {
        "lora_alpha": 2 * options.rank, "target_modules": timed.target_modules,
        "modules_to_save": timed.head,
    }  # fmt: skip
    if name == "adalora":
        config: LoraConfig = AdaLoraConfig(
            init_r=options.rank + options.rank // 2, target_r=options.rank, total_step=steps,
            tinit=steps // 10, tfinal=steps // 3, deltaT=1, **shared,
        )  # fmt: skip
    else:
        config = LoraConfig(r=options.rank, use_dora=name == "dora", **shared)
    return get_peft_model(base, config).train()


def _batch(model: Any, options: argparse.Namespace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.tokens)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    labels = ids if MODELS[options.model].head is None else torch.arange(options.batch) % 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(options.device) for key, value in batch.items()}


def _compare(options: argparse.Namespace) -> dict[str, float]:
    """Return the largest relative error of outputs and gradients, of PEFT and of fused LoRA.

    Both against PEFT in float32; there its own error is 0.

    Raises:
        SystemExit: If the fused ones are further away than PEFT's, by more than `TOLERANCE`.
    """
    exact = argparse.Namespace(**vars(options) | {"dtype": "float32"})
    truth = _outputs_and_gradients("lora", exact)
    errors = {
        name: max(
            float((value - true).norm() / true.norm())
            for value, true in zip(_outputs_and_gradients(name, options), truth, strict=True)
            if true.norm() > 0
        )
        for name in ("lora", "fused")
    }
    if errors["fused"] > 1.2 * errors["lora"] + TOLERANCE:
        sys.exit(f"fused errs more than PEFT ({errors}): there is no sense in timing it")
    return errors


def _outputs_and_gradients(name: str, options: argparse.Namespace) -> list[Tensor]:
    """Return the outputs and gradients of the second forward; the first only finds the groups."""
    run = _Run(name, options)
    run.model.eval()  # without dropout; the fused forward is the same
    generator = torch.Generator().manual_seed(1)
    for key, weight in run.model.named_parameters():
        if "lora_B" in key:
            weight.data = 0.02 * torch.randn(weight.shape, generator=generator).to(weight)
    forward: Callable[[], None] = run._forward_and_backward
    forward()
    run.model.zero_grad()
    forward()
    with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        logits = run.model(**run._batch).logits.detach().float()
    return [logits, *(p.grad.float() for p in run._trained if p.grad is not None)]


if __name__ == "__main__":
    main()
