"""`DynamicLoraCallback` in TRL's trainers under each engine, in two processes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import distributed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from dynlora import DynamicLoraCallback, DynamicLoraConfig
from dynlora.engines.sharding import whole
from dynlora.importance.agreement import AgreementTest
from tests.distributed.cpus_as_gpus import take_cpus_for_gpus
from tests.distributed.launch import NEEDS_DEEPSPEED, fork_group
from tests.distributed.scenarios import differing, found_by, leave
from tests.language import save_language_model
from tests.models import WINDOW

STEPS = 8
PROMPTS = ["red cat ", "small blue ", "old dog ", "new round "] * STEPS
BETTER, WORSE = ["green"] * len(PROMPTS), ["big"] * len(PROMPTS)


def count_of_red(completions: list[str], **_: object) -> list[float]:
    """Return the reward of each completion."""
    return [float(text.count("red")) for text in completions]


TRAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, list[str]]]] = {
    "sft": (SFTTrainer, SFTConfig, {"prompt": PROMPTS, "completion": BETTER}),
    "dpo": (DPOTrainer, DPOConfig, {"prompt": PROMPTS, "chosen": BETTER, "rejected": WORSE}),
    "grpo": (
        partial(GRPOTrainer, reward_funcs=count_of_red),
        partial(GRPOConfig, num_generations=2, max_completion_length=4, beta=0.1),
        {"prompt": PROMPTS},
    ),
    "reward": (
        RewardTrainer,
        RewardConfig,
        {
            "chosen": [f"{prompt}green" for prompt in PROMPTS],
            "rejected": [f"{prompt}big" for prompt in PROMPTS],
        },
    ),
}
"""Trainer, arguments and rows by name."""


def zero(stage: int) -> tuple[DistributedType, dict[str, Any]]:
    """Return DeepSpeed's configuration for a stage."""
    shared = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    size = {"train_micro_batch_size_per_gpu": "auto"}
    return DistributedType.DEEPSPEED, {"deepspeed": {"zero_optimization": shared, **size}}


ENGINES: dict[str, tuple[DistributedType, dict[str, Any]]] = {
    "ddp": (DistributedType.MULTI_CPU, {"use_cpu": True}),
    "fsdp2": (
        DistributedType.FSDP,
        {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    ),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
}
"""Arguments by engine, and the name that Accelerate has for it."""
IN_DEFAULT_SUITE = {("sft", "fsdp2"), ("dpo", "ddp"), ("grpo", "fsdp2"), ("reward", "ddp")}


def combinations() -> list[Any]:
    """Return each trainer with each engine."""
    made = []
    for name in TRAINERS:
        for engine in ENGINES:
            marks = [] if (name, engine) in IN_DEFAULT_SUITE else [pytest.mark.trainers]
            marks += [NEEDS_DEEPSPEED] * engine.startswith("zero")
            made.append(pytest.param(name, engine, marks=marks, id=f"{name}-{engine}"))
    return made


def base_model(folder: str, name: str) -> Any:
    """Return the base model that a trainer trains an adapter of."""
    if name == "reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder)


def train(
    name: str,
    engine: str,
    folder: str,
    out: str,
    others: dict[str, Any] | None = None,
    resume_from: str | None = None,
) -> NoReturn:
    """Train with `others` of the trainer's arguments, and save, in one of the processes."""
    kind, settings = ENGINES[engine]
    if kind != DistributedType.MULTI_CPU:
        take_cpus_for_gpus()
    AgreementTest.is_significant = lambda self: True
    make_trainer, make_arguments, columns = TRAINERS[name]
    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    arguments = make_arguments(output_dir=f"{out}/run", **usual | settings | (others or {}))
    task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    lora = LoraConfig(r=4, target_modules="all-linear", task_type=task)
    given: dict[str, Any] = {"model": folder, "peft_config": lora}
    if name == "dpo":  # of which the trainer makes a second adapter, its reference
        given = {"model": get_peft_model(base_model(folder, name), lora)}
    config = DynamicLoraConfig(hysteresis=0.0, shrink_tolerance=1.0, **WINDOW)
    callback = DynamicLoraCallback(config, resume_from=resume_from)
    rows = Dataset.from_dict(columns)
    trainer = make_trainer(args=arguments, train_dataset=rows, callbacks=[callback], **given)
    trainer.train(resume_from_checkpoint=resume_from)
    assert trainer.accelerator.distributed_type == kind
    assert callback.dynamic is not None
    weights = {n: whole(p).clone() for n, p in adapter_of(trainer.model).items()}
    torch.save(found_by(callback.dynamic, weights=weights), f"{out}/{distributed.get_rank()}.pt")
    trainer.save_model(f"{out}/adapter")
    leave()


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a model's adapter by name."""
    named = model.named_parameters()
    return {name: p.detach() for name, p in named if "lora_" in name and ".default." in name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_language_model(tmp_path_factory.mktemp("model"), hidden=16))


@pytest.mark.parametrize(("name", "engine"), combinations())
def test_ranks_move_alike_in_both_processes_and_the_adapter_loads_in_plain_peft(
    name, engine, folder, tmp_path
):
    codes, said = fork_group(train, name, engine, folder, str(tmp_path))
    assert codes == [0, 0], said[-6000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(set(first["ranks"].values())) > 1
    assert first["history"] == second["history"]
    assert differing(first["weights"], second["weights"]) == []
    loaded = PeftModel.from_pretrained(base_model(folder, name), tmp_path / "adapter")
    assert differing(adapter_of(loaded), first["weights"]) == []
    layers = loaded.base_model.model.get_submodule
    saved = {each: layers(each).r["default"] for each in first["ranks"]}
    assert saved == first["ranks"]


@pytest.mark.trainers
def test_a_run_resumes_under_fsdp2_to_the_same_bits_and_in_one_process_to_the_same_ranks(
    folder, tmp_path
):
    found, middle = {}, str(tmp_path / "whole" / "run" / "checkpoint-3")
    for name, count, last in (("whole", 2, None), ("again", 2, middle), ("alone", 1, middle)):
        out, rows = tmp_path / name, 4 // count
        out.mkdir()
        saving = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": rows}
        given = "sft", "fsdp2", folder, str(out), saving, last
        codes, said = fork_group(train, *given, count=count)
        assert codes == [0] * count, said[-6000:]
        found[name] = torch.load(out / "0.pt")
    whole, again, alone = found.values()
    steps = [event["step"] for event in whole["history"]]
    assert steps[0] <= 3 < steps[-1]
    assert again["history"] == whole["history"]
    assert differing(again["weights"], whole["weights"]) == []
    assert alone["ranks"] == whole["ranks"]
    torch.testing.assert_close(alone["weights"], whole["weights"], rtol=0, atol=1e-5)
