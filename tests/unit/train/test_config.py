"""The job's configuration checks its values when it is made."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from dynlora.errors import ConfigError
from dynlora.train.config import (
    METRICS,
    AdaLoraSettings,
    DataConfig,
    JobConfig,
    LoraSettings,
    ModelConfig,
    TaskName,
    TrainingConfig,
)

PARTS: dict[str, Any] = {
    "output": "out",
    "model": ModelConfig(name="m"),
    "data": DataConfig(name="d"),
}


@pytest.mark.parametrize(
    "sources", [{"name": "m"}, {"path": "p"}, {"package": "a/b"}, {"name": "m", "path": "p"}]
)
def test_a_model_has_one_source_beside_a_path(sources: dict[str, str]) -> None:
    assert ModelConfig(**sources) == ModelConfig(**sources)


@pytest.mark.parametrize(
    ("sources", "found"), [({}, "got none"), ({"name": "m", "package": "a/b"}, "name` and `model")]
)
def test_no_source_or_two_are_refused(sources: dict[str, str], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        ModelConfig(**sources)


def test_data_needs_one_source_too() -> None:
    with pytest.raises(ConfigError, match=r"`data\.path` or `data\.name` or `data\.embedded`"):
        DataConfig()
    with pytest.raises(ConfigError, match=r"`data\.name` and `data\.embedded`"):
        DataConfig(name="d", embedded="stdlib")
    assert DataConfig(name="d", path="p").path == "p"


@pytest.mark.parametrize(
    ("kind", "key", "wrong", "right"),
    [
        (DataConfig, "validation_fraction", (0.0, 1.0), (0.01, 0.99)),
        (DataConfig, "max_length", (7,), (8,)),
        (DataConfig, "num_labels", (1,), (2, None)),
        (DataConfig, "max_train_rows", (0,), (1, None)),
        (DataConfig, "max_validation_rows", (0,), (1, None)),
        (LoraSettings, "r", (0,), (1,)),
        (LoraSettings, "lora_alpha", (0.0, -1.0), (0.1,)),
        (LoraSettings, "lora_dropout", (-0.1, 1.0), (0.0, 0.9)),
        (LoraSettings, "target_modules", ((),), (("q",), "all-linear")),
        (AdaLoraSettings, "initial_fraction", (-0.1, 1.0), (0.0, 0.6)),
        (AdaLoraSettings, "final_fraction", (-0.1, 0.9), (0.0, 0.89)),
        (AdaLoraSettings, "interval", (0,), (1,)),
        (AdaLoraSettings, "orth_reg_weight", (-0.1,), (0.0,)),
        (DataConfig, "validation_rows_from_train", (0,), (1, None)),
        (TrainingConfig, "epochs", (0.0, math.inf, math.nan), (0.5,)),
        (TrainingConfig, "max_steps", (0,), (1, None)),
        (TrainingConfig, "batch_size", (0,), (1,)),
        (TrainingConfig, "eval_batch_size", (0,), (1,)),
        (TrainingConfig, "gradient_accumulation", (0,), (1,)),
        (TrainingConfig, "learning_rate", (0.0, math.inf), (1e-9,)),
        (TrainingConfig, "weight_decay", (-0.1, math.inf), (0.0,)),
        (TrainingConfig, "warmup_ratio", (-0.1, 1.0), (0.0, 0.99)),
        (TrainingConfig, "max_grad_norm", (-1.0,), (0.0,)),
        (TrainingConfig, "eval_steps", (0,), (1,)),
        (TrainingConfig, "save_steps", (0,), (1,)),
        (TrainingConfig, "save_total_limit", (0,), (1, None)),
        (TrainingConfig, "seed", (-1, 2**32), (0, 2**32 - 1)),
        (TrainingConfig, "logging_steps", (0,), (1,)),
    ],
)
def test_each_number_is_held_to_its_range(
    kind: Any, key: str, wrong: tuple[Any, ...], right: tuple[Any, ...]
) -> None:
    base = {"name": "d"} if kind is DataConfig else {}
    for value in right:
        assert getattr(kind(**base, **{key: value}), key) == value
    for value in wrong:
        shown = "[]" if value == () else str(value)
        with pytest.raises(ConfigError) as error:
            kind(**base, **{key: value})
        assert f".{key}` must be" in str(error.value)
        assert f"got {shown}." in str(error.value)


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        ({"eval": "epoch", "save": "epoch"}, True),
        ({"eval": "steps", "save": "steps", "eval_steps": 5, "save_steps": 5}, True),
        ({"eval": "steps", "save": "steps", "eval_steps": 5, "save_steps": 10}, False),
        ({"eval": "steps", "save": "steps", "eval_steps": 10, "save_steps": 5}, False),
        ({"eval": "epoch", "save": "steps"}, False),
        ({"eval": "no", "save": "no"}, False),
    ],
)
def test_the_best_checkpoint_needs_one_at_each_evaluation(values: Any, fits: bool) -> None:
    assert TrainingConfig(**values)
    if fits:
        assert TrainingConfig(load_best_model_at_end=True, **values)
    else:
        with pytest.raises(ConfigError, match=f"eval={values['eval']} .*save={values['save']}"):
            TrainingConfig(load_best_model_at_end=True, **values)


@pytest.mark.parametrize("method", ["adalora", "full"])
def test_a_scale_that_the_method_does_not_have_is_refused(method: Any) -> None:
    told = f"`lora.use_rslora` must be false with `method: {method}`, got true"
    with pytest.raises(ConfigError, match=told):
        JobConfig(**PARTS, method=method, lora=LoraSettings(use_rslora=True))


@pytest.mark.parametrize("output", ["~", "~/runs/x", "~me/x"])
def test_a_home_that_no_shell_has_put_in_is_refused(output: str) -> None:
    with pytest.raises(ConfigError, match=f"`output` must be a path in full, .* got {output}"):
        JobConfig(**PARTS | {"output": output})


def test_adalora_must_start_above_its_target() -> None:
    JobConfig(**PARTS, lora=LoraSettings(r=8), adalora=AdaLoraSettings(init_r=9))
    with pytest.raises(ConfigError, match=r"above lora\.r=8, got 8"):
        JobConfig(**PARTS, lora=LoraSettings(r=8), adalora=AdaLoraSettings(init_r=8))


@pytest.mark.parametrize("training", [{"resume": "latest"}, {"load_best_model_at_end": True}])
def test_adalora_cannot_load_its_own_checkpoints(training: Any) -> None:
    with pytest.raises(ConfigError, match="PEFT does not save"):
        JobConfig(**PARTS, method="adalora", training=TrainingConfig(**training))
    assert JobConfig(**PARTS, method="lora", training=TrainingConfig(**training))


def test_every_field_says_what_it_is() -> None:
    """The string under a field is its only description; help and documentation read it."""
    import ast

    from dynlora.train import config

    seen = set()
    for path in Path(str(config.__file__)).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign):
                    described = isinstance(after, ast.Expr) and isinstance(
                        after.value, ast.Constant
                    )
                    assert described, f"{node.name}.{ast.unparse(field.target)}"
                    seen.add(f"{node.name}.{ast.unparse(field.target)}")
    assert seen >= {"JobConfig.task", "DataConfig.text", "LoraSettings.r", "TrainingConfig.seed"}


@pytest.mark.parametrize("task", list(METRICS))
def test_the_best_metric_must_be_one_of_the_tasks(task: Any) -> None:
    for metric in METRICS[task]:
        training = TrainingConfig(best_metric=metric)
        assert JobConfig(**PARTS, task=task, training=training).training.best_metric == metric
    shown = ", ".join(METRICS[task])
    with pytest.raises(ConfigError, match=rf"metric of `task: {task}`, one of {shown}, got bleu"):
        JobConfig(**PARTS, task=task, training=TrainingConfig(best_metric="bleu"))


def test_each_task_has_metrics_and_every_one_has_the_loss() -> None:
    assert set(METRICS) == set(get_args(TaskName))
    assert all(names[0] != "loss" and names[-1] == "loss" for names in METRICS.values())


def test_configurations_cannot_be_changed() -> None:
    job = JobConfig(**PARTS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.output = "elsewhere"
