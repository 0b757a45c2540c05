"""The file and the options of a job, read into its configuration."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from dynlora import DynamicLoraConfig
from dynlora.cli.job_parser import build, key_words, parse_job, parse_values, valid_keys
from dynlora.errors import ConfigError
from dynlora.train.config import JobConfig, LoraSettings

MINIMAL = {"output": "out", "model": {"name": "m"}, "data": {"name": "d"}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"lora": {"r": 4}, "dynamic": {"events": 2}}))
    return path


def test_what_is_not_given_has_its_default(file: Path) -> None:
    config = parse_job([str(file)])
    assert config is not None
    assert config.lora == LoraSettings(r=4)
    assert config.method == "dynamic"
    assert config.dynamic.events == 2
    assert config.training.batch_size == 32
    assert not config.overwrite


def test_the_command_line_wins_over_the_file(file: Path) -> None:
    config = parse_job([str(file), "--lora.r", "6", "--dynamic.events=9"])
    assert config is not None
    assert config.lora.r == 6
    assert config.dynamic.events == 9


def test_lists_numbers_switches_and_null_keep_their_types(file: Path) -> None:
    config = parse_job(
        [
            str(file),
            "--lora.target_modules=[query, value]",
            "--dynamic.pinned=[bert.pooler*]",
            "--training.learning_rate=2e-4",
            "--training.bf16=true",
            "--training.save_total_limit=null",
            "--data.text_pair=other",
            "--overwrite=true",
        ]
    )
    assert config is not None
    assert config.lora.target_modules == ("query", "value")
    assert config.dynamic.pinned == ("bert.pooler*",)
    assert config.training.learning_rate == 2e-4
    assert config.training.bf16 is True
    assert config.training.save_total_limit is None
    assert config.data.text_pair == "other"
    assert config.overwrite is True


def test_a_switch_reads_the_words_of_yaml(file: Path) -> None:
    for word, value in (("yes", True), ("no", False), ("true", True), ("false", False)):
        config = parse_job([str(file), "--overwrite", word])
        assert config is not None
        assert config.overwrite is value


def test_every_value_of_the_file_arrives(tmp_path: Path) -> None:
    """A configuration in which nothing is at its default comes back as it was written."""
    values = {
        "output": "somewhere", "overwrite": True, "task": "sequence_classification",
        "method": "lora",
        "model": {"name": None, "path": "models/a", "package": "p/q", "gguf_file": "m.gguf",
                  "dtype": "bfloat16", "quantization": "nf4"},
        "data": {
            "name": "n", "subset": "s", "path": None, "embedded": None, "text": "a",
            "text_pair": "b", "prompt": "p", "completion": "q", "separator": " ",
            "as_chat": True, "messages": None, "completion_only": False, "max_new_tokens": 5,
            "image": "i", "label": "c", "num_labels": 3, "train_split": "t",
            "validation_split": "v", "validation_fraction": 0.5, "max_length": 9,
            "max_train_rows": 7, "max_validation_rows": 6, "validation_rows_from_train": 4,
        },
        "lora": {"r": 3, "lora_alpha": 5.0, "lora_dropout": 0.5, "target_modules": ["x"],
                 "modules_to_save": ["y"], "use_rslora": True, "use_dora": True,
                     "init_lora_weights": "gaussian", "start_from": "z"},
        "dynamic": {
            "importance": "spectral", "temperature": 2.0, "uniform_mix": 0.25,
            "feature": "variance", "feature_weight": 0.5, "layer_weights": True,
            "input_adaptive": True, "min_rank": 2, "max_rank": 9,
            "pinned": ["p"], "total_steps": 77, "first_event": 0.2, "last_event": 0.6,
            "events": 4, "hysteresis": 0.5, "shrink_tolerance": 0.2, "fused": False,
            "mode": "physical", "on_nonfinite": "stop", "seed": 5,
        },
        "adalora": {
            "init_r": 30, "initial_fraction": 0.2, "final_fraction": 0.1, "interval": 3,
            "orth_reg_weight": 0.7,
        },
        "training": {
            "epochs": 1.5, "max_steps": 8, "batch_size": 2, "eval_batch_size": 3,
            "gradient_accumulation": 4, "learning_rate": 0.5, "loraplus_lr_ratio": 8.0,
            "weight_decay": 0.1,
            "warmup_ratio": 0.2, "schedule": "cosine", "max_grad_norm": 2.0, "bf16": True,
            "group_by_length": False, "eval": "steps", "eval_steps": 5,
            "eval_on_start": False, "save": "steps",
            "save_steps": 5, "save_total_limit": 1, "load_best_model_at_end": True,
            "best_metric": "f1", "early_stopping_patience": 2, "logging_steps": 3,
            "report_to": ["tensorboard", "trackio"], "seed": 4, "resume": "latest",
        },
    }  # fmt: skip
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump(values))
    config = parse_job([str(path)])
    assert config is not None
    assert json.loads(json.dumps(asdict(config))) == values


def test_the_help_ends_without_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_job(["--help"]) is None
    assert "usage: dynlora train CONFIG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lora.alpha", "`lora.lora_alpha`"),
        ("lora.rank", "`lora.r`"),
        ("training.lr", "`training.learning_rate`"),
        ("lora.learning_rate", "`training.learning_rate`"),
        ("lora.wd", "valid names are `lora.r`"),
        ("batch_size", "`training.batch_size`"),
        ("train.seed", "`training.seed`"),
        ("data.max_len", "`data.max_length`"),
        ("model.paht", "`model.path`"),
        ("dynamic.metric", "`dynamic.importance`"),
        ("ouput", "`output`"),
    ],
)
def test_an_unknown_key_leads_to_valid_ones(file: Path, key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key `{key}` on the command line") as error:
        parse_job([str(file), f"--{key}", "1"])
    assert near in str(error.value)


def test_an_unknown_key_in_the_file_is_named_with_the_file(file: Path) -> None:
    file.write_text(file.read_text() + "traning: {epochs: 1}\n")
    with pytest.raises(ConfigError, match=r"`traning` in .*job\.yaml: .*`training`"):
        parse_job([str(file)])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training.schedule", "linera", "one of linear, cosine, constant, got linera. The nearest"),
        ("training.eval", "epochs", "one of epoch, steps, no, got epochs. The nearest valid value"),
        (
            "training.report_to",
            "wandb",
            "a list of tensorboard, wandb, trackio, got wandb. Write it as a list: [wandb].",
        ),
        ("data.embedded", "stdlb", "stdlib or null, got stdlb. The nearest valid value is stdlib"),
        ("data.num_labels", "two", "a whole number or null, got two"),
        ("overwrite", "maybe", "true or false, got maybe"),
        ("lora.lora_alpha", "big", "a number, got big"),
        ("lora.r", "null", "a whole number, got null"),
        ("training.eval", "null", "one of epoch, steps, no, got null"),
        ("dynamic.pinned", "null", "a list such as [a, b], got null"),
        ("training.report_to", "[tensorbord]", "a list of tensorboard, wandb, trackio, got"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_the_right_one(
    file: Path, key: str, value: str, told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_job([str(file), f"--{key}", value])
    assert f"`{key}` must be {told}" in str(error.value)


def test_a_null_in_the_file_is_told_what_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"training": {"batch_size": None}}))
    with pytest.raises(
        ConfigError, match=r"`training\.batch_size` must be a whole number, got null"
    ):
        parse_job([str(path)])


def test_a_bare_no_which_yaml_takes_for_false_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "training: {eval: no}\n")
    with pytest.raises(ConfigError, match=r"one of epoch, steps, no, got False\..*'no' in quotes"):
        parse_job([str(path)])


@pytest.mark.parametrize("value", ["!!timestamp x", "[!!timestamp x]", "!!bool maybe"])
def test_a_value_with_a_type_of_yaml_is_refused_by_its_key(tmp_path: Path, value: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    for given in (["--data.text", value], [f"--data.text={value}"]):
        with pytest.raises(ConfigError, match=r"`data.text` must be .* got '\[?!!"):
            parse_job([str(path), *given])


@pytest.mark.parametrize("value", ["hello !!world", "!", "a: [", "%"])
def test_a_text_on_the_command_line_may_hold_what_yaml_does_not_take(
    tmp_path: Path, value: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    config = parse_job([str(path), "--data.text", value])
    assert config is not None
    assert config.data.text == value


def test_a_missing_output_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "m"}, "data": {"name": "d"}}))
    with pytest.raises(ConfigError, match="`output` must be given, in CONFIG or as --output"):
        parse_job([str(path)])
    config = parse_job([str(path), "--output", "there"])
    assert config is not None
    assert config.output == "there"


def test_a_range_is_told_with_the_section_of_its_key() -> None:
    with pytest.raises(ConfigError, match=r"`dynamic\.min_rank` must be at least 1, got 0"):
        build(JobConfig, MINIMAL | {"dynamic": {"min_rank": 0}})
    with pytest.raises(ConfigError, match=r"^`lora\.r` must be at least 1, got 0"):
        build(JobConfig, MINIMAL | {"lora": {"r": 0}})


def test_words_offered_for_a_key_are_taken_by_it(file: Path) -> None:
    offered = {key: key_words(hint) for key, hint in valid_keys()}
    assert offered["method"] == ["dynamic", "lora", "adalora", "full"]
    assert offered["training.bf16"] == ["auto", "true", "false"]
    assert offered["lora.r"] == offered["training.report_to"] == []
    for key in ("training.schedule", "training.bf16", "overwrite", "lora.target_modules"):
        for word in offered[key]:
            assert parse_job([str(file), f"--{key}", word]) is not None


def test_valid_keys_are_all_sections_and_all_their_fields() -> None:
    keys = [key for key, _ in valid_keys()]
    assert len(keys) == len(set(keys))
    assert {"output", "lora", "lora.r", "training.resume", "adalora.init_r"} <= set(keys)
    assert keys.index("lora") < keys.index("lora.r")


@pytest.mark.parametrize("preset", ["papr", None, 3, ["paper"]])
def test_what_is_no_preset_is_told_which_there_are(tmp_path: Path, preset: object) -> None:
    values = MINIMAL | {"dynamic": {"preset": preset}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    for parse, given in ((parse_job, [str(path)]), (parse_values, values)):
        with pytest.raises(ConfigError, match="one of default, paper, got") as error:
            parse(given)
        assert str(preset) in str(error.value)


@pytest.mark.parametrize("place", ["file", "command line", "values"])
def test_a_preset_gives_the_section_what_is_not_given(tmp_path: Path, place: str) -> None:
    values = MINIMAL | {"dynamic": {"preset": "paper", "events": 8, "uniform_mix": 0.5}}
    options = ["--dynamic.hysteresis", "0"]
    if place == "command line":
        values = MINIMAL | {"dynamic": {"preset": "default", "events": 8, "uniform_mix": 0.5}}
        options += ["--dynamic.preset=paper"]
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    if place == "values":
        values["dynamic"] |= {"hysteresis": 0.0}
        config = parse_values(values)
    else:
        config = parse_job([str(path), *options])
    assert config is not None
    # The mix is at its default, and given: the preset's own does not count.
    expected = DynamicLoraConfig.from_preset("paper", events=8, uniform_mix=0.5, hysteresis=0.0)
    assert config.dynamic == expected


def test_a_printed_configuration_of_a_preset_reads_back_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, again = tmp_path / "job.yaml", tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"dynamic": {"preset": "paper", "events": 5}}))
    capsys.readouterr()
    assert parse_job([str(path), "--print_config"]) is None
    again.write_text(capsys.readouterr().out)
    assert parse_job([str(again)]) == parse_job([str(path)])


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        ({"preset": "papr"}, [], "`dynamic.preset` must be one of default, paper, got papr"),
        ({}, ["--dynamic.preset", "best"], "one of default, paper, got best"),
        ({}, ["--dynamic.preset=5"], "one of default, paper, got 5"),
        ({}, ["--dynamic.preset"], "`--dynamic.preset` must be followed by a value"),
        ({}, ["--overwrite"], "got none: say, for example, `--overwrite true`"),
        ({}, ["--output"], "`--output` must be followed by a value, got none."),
        ({"presets": "paper"}, [], "unknown key `dynamic.presets`.*`dynamic.preset`"),
    ],
)
def test_a_preset_must_be_one_that_there_is(
    tmp_path: Path, given: dict[str, str], options: list[str], told: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"dynamic": given}))
    with pytest.raises(ConfigError, match=told):
        parse_job([str(path), *options])
