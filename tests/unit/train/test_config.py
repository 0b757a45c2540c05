"""The job's configuration: limits of each key, and how keys fit together."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
from pydantic import ValidationError

from dynlora import DynamicLoraConfig
from dynlora.errors import ConfigError
from dynlora.train.config import (
    METRICS,
    AdaLoraSettings,
    DataConfig,
    JobConfig,
    LoraSettings,
    ModelConfig,
    TrainingConfig,
)
from dynlora.train.config_file import make_job

MINIMAL: dict[str, Any] = {"output": "out", "model": {"name": "m"}, "data": {"name": "d"}}


def job(**sections: Any) -> JobConfig:
    return make_job(MINIMAL | sections)


@pytest.mark.parametrize(
    ("section", "key", "wrong", "right"),
    [
        ("data", "validation_fraction", (0.0, 1.0), (0.01, 0.99)),
        ("data", "max_length", (7,), (8,)),
        ("data", "num_labels", (1,), (2, None)),
        ("lora", "r", (0, True, 8.0), (1,)),
        ("lora", "lora_alpha", (0.0, -1.0, True), (0.1, 3)),
        ("lora", "lora_dropout", (-0.1, 1.0), (0.0, 0.9)),
        ("lora", "target_modules", ((),), (("q",), "all-linear")),
        ("adalora", "final_fraction", (-0.1, 0.9), (0.0, 0.89)),
        ("dynamic", "uniform_mix", (-0.1, 1.1), (0.0, 1.0)),
        ("dynamic", "first_event", (0.0, 1.1), (0.3,)),
        ("dynamic", "last_event", (0.04, 1.1), (0.05, 1.0)),
        ("training", "epochs", (0.0, math.inf, math.nan), (0.5,)),
        ("training", "weight_decay", (-0.1, math.inf), (0.0,)),
        ("training", "save_total_limit", (0,), (1, None)),
        ("training", "seed", (-1, 2**32), (0, 2**32 - 1)),
    ],
)
def test_each_kind_of_number_has_its_limits(
    section: str, key: str, wrong: tuple[Any, ...], right: tuple[Any, ...]
) -> None:
    start = MINIMAL.get(section, {})
    for value in right:
        made = job(**{section: start | {key: value}})
        assert getattr(getattr(made, section), key) == value
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"`{section}\.{key}` must be .*got"):
            job(**{section: start | {key: value}})


def test_sections_are_checked_when_they_are_made_in_python() -> None:
    with pytest.raises(ValidationError):
        LoraSettings(r=0)
    with pytest.raises(ValidationError):
        LoraSettings(rank=8)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"`lora\.r` must be even .* got 3"):
        LoraSettings(r=3, init_lora_weights="orthogonal")


@pytest.mark.parametrize(
    "model", [{"name": "m"}, {"path": "p"}, {"package": "a/b"}, {"name": "m", "path": "p"}]
)
def test_a_model_has_one_source_beside_a_path(model: dict[str, str]) -> None:
    assert job(model=model).model == ModelConfig(**model)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"name": "m", "package": "a/b"}}, "`model.name` and `model.package`"),
        ({"data": {}}, "`data.path` or `data.name` or `data.embedded`, but got none"),
        ({"data": {"name": "d", "embedded": "stdlib"}}, "`data.name` and `data.embedded`"),
        ({"data": {"name": "d", "as_chat": True}}, "`data.as_chat` must be false"),
        ({"output": "~/runs/x"}, "`output` must be a full path"),
        ({"method": "full", "lora": {"use_rslora": True}}, "false with `method: full`, but got"),
        ({"method": "adalora", "training": {"resume": "latest"}}, "PEFT does not save"),
        ({"method": "adalora", "training": {"load_best_model_at_end": True}}, "cannot load its"),
        ({"dynamic": {"mode": "static"}}, "auto or physical in one process"),
    ],
)
def test_keys_that_do_not_fit_together_are_named(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        job(**sections)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("eval_", "save", "fits"),
    [
        (("epoch", 1), ("epoch", 2), True),
        (("steps", 5), ("steps", 5), True),
        (("steps", 5), ("steps", 10), False),
        (("no", 5), ("no", 5), False),
    ],
)
def test_the_best_checkpoint_needs_one_at_each_evaluation(
    eval_: Any, save: Any, fits: bool
) -> None:
    values = {"eval": eval_[0], "eval_steps": eval_[1], "save": save[0], "save_steps": save[1]}
    assert TrainingConfig(**values)
    refused = pytest.raises(ConfigError, match=f"eval={eval_[0]} .*save={save[0]}")
    with nullcontext() if fits else refused:
        TrainingConfig(load_best_model_at_end=True, **values)


def test_the_best_metric_must_be_one_of_the_tasks() -> None:
    for task, names in METRICS.items():
        assert names[0] != "loss" == names[-1]
        for metric in names:
            assert job(task=task, training={"best_metric": metric}).task == task
        with pytest.raises(ConfigError, match=rf"`task: {task}`, one of .*, but got bleu"):
            job(task=task, training={"best_metric": "bleu"})


def test_a_preset_fills_in_what_is_not_given() -> None:
    given = {"preset": "paper", "events": 8, "uniform_mix": 0.2}
    # The mix is given, although at its default: the preset's own does not count.
    expected = DynamicLoraConfig.from_preset("paper", events=8, uniform_mix=0.2)
    assert job(dynamic=given).dynamic == expected
    assert job(dynamic={}).dynamic == DynamicLoraConfig()


def test_sections_of_defaults_are_equal_to_sections_left_out() -> None:
    whole = job(lora={}, adalora={}, training={}, dynamic={"preset": "default"})
    assert whole == job()
    assert (whole.lora, whole.adalora) == (LoraSettings(), AdaLoraSettings())
    assert whole.data == DataConfig(name="d")
