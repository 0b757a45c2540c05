"""What each of two processes does: `torchrun -m tests.distributed.worker PART OUT`.

One launch trains all that the tests look at, because starting processes takes longer than training.
"""

import copy
import os
import signal
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils._pytree import tree_map
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dynlora import DynamicLora, DynamicLoraConfig
from dynlora.adapters import resize
from dynlora.errors import EngineError
from dynlora.integrations.checkpoint import load_state, save_state
from tests.distributed.scenarios import (
    COMPILED,
    CONFIG,
    ENGINES,
    EXPERTS,
    LOST_AT,
    RESUMED_AT,
    STEPS,
    base_norms,
    batches,
    config_of,
    found_by,
    leave,
    lora_weights,
    model_in_float64,
    optimizer_of,
)
from tests.integration.test_trainer import trainer_of
from tests.lora_layers import lora_chain
from tests.models import lora_llama, loss_of, train


class Process:
    """One process's part of a model under an engine, and what it saw."""

    def __init__(self, engine: str, scenario: str, *, attaches_first: bool = False) -> None:
        """Attach under Accelerate's DDP to the wrapped model, unless it `attaches_first`."""
        self.model, self.made = sharded(engine, scenario)
        self.called: nn.Module = self.model
        self.optimizer: Any = self.made
        self.accumulates = engine == "accelerate_ddp"
        self.accelerator = None
        if engine.startswith("accelerate"):
            block = self.model.get_base_model().model.layers[0]
            self.accelerator = accelerator_of(engine, block=type(block).__name__)
        if attaches_first:
            self.dynamic = DynamicLora(self.model, self.optimizer, config_of(scenario))
        if self.accelerator is not None:
            self.called, self.optimizer = self.accelerator.prepare(self.model, self.made)
            self.model = self.accelerator.unwrap_model(self.called)
        self.trained = trained(self.model)
        if not attaches_first:
            self.dynamic = DynamicLora(self.called, self.optimizer, config_of(scenario))
        if engine == "ddp":
            self.called = DistributedDataParallel(self.model)
        self.seen: dict[int, dict[str, Tensor]] = {}
        """Weights by step, after each event and at the end."""
        self.held: list[int] = []
        """Bytes of the adapter's tensors in each step."""

    def train(self, first: int, last: int) -> None:
        """Take the steps from `first` to `last`, each on this process's part of the batch."""
        for step, tokens in enumerate(batches(first, last, part=distributed.get_rank()), first + 1):
            earlier = len(self.dynamic.history)
            parts = tokens.chunk(2 if self.accumulates else 1)
            for rows in parts[:-1]:
                with self.called.no_sync():
                    loss_of(self.called, rows).div(len(parts)).backward()
            loss = loss_of(self.called, parts[-1]) / len(parts)
            loss.backward()  # the graph stays alive until the forward after an event
            self.dynamic.observe()
            self.optimizer.step()
            self.held.append(held_bytes(self.made))
            if step % 5 == 0:  # after which FSDP2 keeps what it gathered for its root
                with torch.no_grad():
                    loss_of(self.called, tokens)
            self.dynamic.step()
            self.optimizer.zero_grad()
            if step == last or len(self.dynamic.history) > earlier:
                self.seen[step] = {n: whole(w) for n, w in lora_weights(self.model).items()}

    def found(self) -> dict[str, object]:
        """Return all that the tests look at."""
        return found_by(
            self.dynamic,
            weights=self.seen,
            base_norms=base_norms(self.model),
            bytes=fmean(self.held),
            same_parameters=self.trained == trained(self.model) == trained(self.made),
        )


def sharded(engine: str, scenario: str) -> tuple[Any, AdamW]:
    """Return the model, of which FSDP2 shards one block alone and the rest, and its optimizer."""
    model = model_in_float64(scenario)
    if engine == "fsdp2":
        fully_shard(model.get_base_model().model.layers[0])
        fully_shard(model)
    return model, optimizer_of(model)


def trained(of: nn.Module | AdamW) -> list[int]:
    """Return the identities of a model's trained parameters, or of an optimizer's."""
    if isinstance(of, AdamW):
        return [id(p) for group in of.param_groups for p in group["params"]]
    return [id(p) for p in of.parameters() if p.requires_grad]


def held_bytes(optimizer: AdamW) -> int:
    """Return this process's bytes of trained weights, their gradients and moments."""
    tensors: list[Any] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors += [parameter, parameter.grad, *optimizer.state[parameter].values()]
    local = [t.detach().to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in local)}.values())


def lora_bytes(engine: str, scenario: str) -> int:
    """Return the same of plain LoRA."""
    model, optimizer = sharded(engine, scenario)
    loss_of(model, *batches(0, 1)).backward()
    optimizer.step()
    return held_bytes(optimizer)


def accelerator_of(
    engine: str, state_dict_type: str = "SHARDED_STATE_DICT", *, block: str = "LlamaDecoderLayer"
) -> Accelerator:
    """Return an Accelerator that shards as that of `accelerate launch`; on CPUs it does not."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    if engine == "accelerate_ddp":
        return accelerator
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=True,
        state_dict_type=state_dict_type,
    )
    return accelerator


def whole(value: Any) -> Any:
    """Return a tensor with the parts of all processes, and anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def save(folder: Path, model: nn.Module) -> None:
    """Save the adapter, once, as the engines' own documentation says."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)


def train_under(engine: str, importance: str, out: Path) -> None:
    """Train to the end, then once more from the state in the middle."""
    place = distributed.get_rank()
    process = Process(engine, importance)
    process.train(0, RESUMED_AT)
    state = process.dynamic.state_dict()
    weights = {k: v.clone() for k, v in process.model.state_dict().items()}
    moments = copy.deepcopy(process.optimizer.state_dict())
    checkpoint = out / f"{importance}-checkpoint"
    for_one_process = [tree_map(whole, part) for part in (weights, moments)]
    if place == 0:
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_state(checkpoint, state)
        for name, part in zip(("model", "optimizer"), for_one_process, strict=True):
            torch.save(part, checkpoint / f"{name}.pt")
    if process.accelerator is not None:
        process.accelerator.save_state(str(checkpoint))
    process.train(RESUMED_AT, STEPS)
    save(out / f"{importance}-adapter", process.model)
    distributed.barrier()
    torch.save(process.found(), out / f"{importance}-{place}.pt")

    if engine == "ddp":  # the wrapper is used already
        again = process
    else:
        again = Process(engine, importance, attaches_first=engine == "accelerate_ddp")
    again.dynamic.load_state_dict(load_state(checkpoint))
    if again.accelerator is not None:
        again.accelerator.load_state(str(checkpoint))
    else:
        again.model.load_state_dict(weights)
        again.optimizer.load_state_dict(moments)
    again.train(RESUMED_AT, STEPS)
    torch.save(again.found(), out / f"{importance}-resumed-{place}.pt")


class Killed(TrainerCallback):
    """Kills the second process after a step, as a machine that is lost."""

    def on_step_end(self, args, state, control, **others):  # type: ignore[no-untyped-def]
        """Kill it."""
        if state.global_step == LOST_AT and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train_by_sharding_trainer(out: Path) -> None:
    """Train with `transformers.Trainer` under FSDP2, then again from the state in the middle."""

    def shared(**given: Any) -> Accelerator:
        accelerator_of("accelerate_fsdp2", "FULL_STATE_DICT")
        return Accelerator(**given)

    folder = out / "run"
    for name, last in (("whole", None), ("resumed", folder / f"checkpoint-{RESUMED_AT}")):
        with patch("transformers.trainer.Accelerator", shared):
            trainer, callback = saving_trainer(folder, resume_from=last)
        trainer.train(resume_from_checkpoint=last and str(last))
        save_found(trainer, callback, out, name)


def saving_trainer(folder: Path, **given: Any) -> Any:
    """Return a Trainer of a new model with a checkpoint in the middle, and its callback."""
    return trainer_of(
        lora_llama(r=8).double(),
        folder,
        steps=STEPS,
        per_device_train_batch_size=4,
        ddp_backend="gloo",
        save_strategy="steps",
        save_steps=RESUMED_AT,
        **given,
    )


def save_found(trainer: Any, callback: Any, out: Path, name: str) -> None:
    """Save the adapter, and what this process found."""
    weights = {n: whole(w) for n, w in lora_weights(trainer.model).items()}
    found = found_by(callback.dynamic, weights=weights)
    torch.save(found, out / f"{name}-{distributed.get_rank()}.pt")
    trainer.save_model(str(out / f"{name}-adapter"))
    distributed.barrier()


def train_by_trainer(out: Path, name: str, *callbacks: TrainerCallback) -> None:
    """Train with `transformers.Trainer`, from the last checkpoint that there is."""
    folder = out / f"{name}-run"
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    resumes = name == "resumed" and not callbacks
    assert last == (str(folder / f"checkpoint-{RESUMED_AT}") if resumes else None)
    trainer, callback = saving_trainer(folder, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=last)
    save_found(trainer, callback, out, name)


def train_unlike(out: Path) -> None:
    """Train where processes would plan differently: rounding could make them differ, too.

    Each has a floor under its shares of its own, and the second would grow other directions.
    """
    place, made = distributed.get_rank(), resize.new_rows
    model = model_in_float64()
    optimizer = optimizer_of(model)
    config = DynamicLoraConfig(
        importance="gradient_norm", shrink_tolerance=1, uniform_mix=float(place), **CONFIG
    )
    called = DistributedDataParallel(model)
    dynamic = DynamicLora(called, optimizer, config)
    others = patch.object(
        resize, "new_rows", lambda *a, **k: [rows + 1e-3 * place for rows in made(*a, **k)]
    )
    with others:
        train(called, optimizer, dynamic, STEPS, batches=batches(0, STEPS, part=place))
    torch.save(found_by(dynamic, weights=lora_weights(model)), out / f"unlike-{place}.pt")


def call_the_bare_model(out: Path) -> None:
    """Attach to a wrapped model, and take a step without the wrapper."""
    place = distributed.get_rank()
    model = model_in_float64()
    wrapped = DistributedDataParallel(model)
    dynamic = DynamicLora(wrapped, optimizer_of(model), DynamicLoraConfig(**CONFIG))
    (tokens,) = batches(0, 1, part=place)
    loss_of(model, tokens).backward()
    try:
        dynamic.observe()
    except EngineError as error:
        torch.save(str(error), out / f"refusal-{place}.pt")


def train_compiled(out: Path, order: str) -> None:
    """Train layers after some of: attach, compile the model, its parts, wrap it in DDP."""
    place = distributed.get_rank()
    model = lora_chain(*[8] * 5, r=2).train()
    called, optimizer = model, optimizer_of(model)
    config = DynamicLoraConfig(importance="random", shrink_tolerance=1, fused=False, **CONFIG)
    for step in order.split():
        if step == "attach":
            dynamic = DynamicLora(called, optimizer, config)
        elif step == "compile":
            called = torch.compile(called, backend="eager")
        elif step == "parts":
            for layer in model.base_model.model:
                layer.compile(backend="eager")
        else:
            called = DistributedDataParallel(called)
    torch.manual_seed(0)
    train(
        called,
        optimizer,
        dynamic,
        STEPS,
        batches=(torch.randn(4, 8, dtype=torch.float64)[place::2] for _ in range(STEPS)),
        loss=lambda model, x: (model(x) - x.roll(1, dims=1)).square().mean(),
    )
    torch.save(found_by(dynamic, weights=lora_weights(model)), out / f"{order}-{place}.pt")


class SlowToFree(Tensor):
    """Needs the interpreter for two seconds when it is freed."""

    def __del__(self) -> None:
        """Wait."""
        time.sleep(2)


def leave_to_gloo() -> None:
    """End while Gloo's thread has the last reference to a tensor, which may not stop a process."""
    wrapped = DistributedDataParallel(nn.Linear(4, 4))
    wrapped(torch.ones(2, 4)).sum().backward()
    if distributed.get_rank() == 0:
        distributed.all_reduce(torch.ones(4).as_subclass(SlowToFree), async_op=True)
    else:
        time.sleep(1)
        distributed.all_reduce(torch.ones(4))
    leave()


def main() -> None:
    """Do all parts, or lose a process."""
    part, out = sys.argv[1], Path(sys.argv[2])
    distributed.init_process_group("gloo")
    if part == "lost":
        train_by_trainer(out, "resumed", Killed())
    for name in ("whole", "resumed"):
        train_by_trainer(out, name)
    train_by_sharding_trainer(out / "trainer_fsdp2")
    call_the_bare_model(out)
    train_unlike(out)
    for order in COMPILED:
        train_compiled(out, order)
    plain = {scenario: lora_bytes("fsdp2", scenario) for scenario in ("signal", EXPERTS)}
    torch.save(plain, out / f"bytes-{distributed.get_rank()}.pt")
    for engine, scenarios in ENGINES.items():
        for importance in scenarios:
            train_under(engine, importance, out / engine)
    leave_to_gloo()


if __name__ == "__main__":
    main()
