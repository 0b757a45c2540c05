"""Jobs: values and options in, errors with key and place out, and `config.yaml`."""

import math
from dataclasses import asdict

import pytest
import yaml
from pydantic import ValidationError

from dynlora import DynamicLoraConfig
from dynlora.errors import ConfigError
from dynlora.files.plain_values import flatten
from dynlora.train.config import LoraSettings
from dynlora.train.config.keys import settings, words
from dynlora.train.config_file import make_job, plain_values, read_job, write_config
from tests.jobs import MINIMAL, minimal_job, parse_job

TRACKERS = "tensorboard, wandb, trackio"
WHOLE = yaml.safe_dump(MINIMAL)


@pytest.fixture
def write(tmp_path):
    """Return a writer of a job file of the smallest job with these sections."""

    def file(**sections):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | sections))
        return path

    return file


def nested(key, value):
    """Return the part of a file that sets one dotted key."""
    section, _, leaf = key.rpartition(".")
    return {section: MINIMAL.get(section, {}) | {leaf: value}} if section else {leaf: value}


KEYS = {
    "": "output overwrite task method",
    "model.": "name path package gguf_file dtype quantization teacher",
    "data.": "name subset path text text_pair prompt completion separator as_chat "
    "messages completion_only max_new_tokens image label num_labels train_split validation_split "
    "validation_rows_from_train validation_fraction max_length max_train_rows max_validation_rows",
    "lora.": "r lora_alpha lora_dropout target_modules modules_to_save use_rslora use_dora "
    "init_lora_weights start_from",
    "dynamic.": "preset importance temperature uniform_mix feature feature_weight layer_weights "
    "input_adaptive min_rank max_rank budget_end budget_tolerance pinned total_steps first_event "
    "last_event events hysteresis shrink_tolerance fused on_nonfinite seed",
    "adalora.": "init_r initial_fraction final_fraction interval orth_reg_weight",
    "training.": "epochs max_steps batch_size eval_batch_size gradient_accumulation learning_rate "
    "loraplus_lr_ratio weight_decay warmup_ratio schedule max_grad_norm activation_checkpointing "
    "gradient_checkpointing optim packing neftune_noise_alpha dpo_beta "
    "bf16 group_by_length eval eval_on_start eval_steps save save_steps save_total_limit "
    "load_best_model_at_end best_metric early_stopping_patience logging_steps report_to seed "
    "resume",
}


@pytest.mark.parametrize(("given", "end"), [({}, "auto"), ({"budget_end": 0.5}, 0.5)])
def test_an_automatic_rank_is_a_ceiling_of_64_whose_end_is_searched(given, end):
    job = make_job(MINIMAL | {"lora": {"r": "auto"}, "dynamic": given})
    assert (job.lora.r, job.dynamic.budget_end) == (64, end)
    with pytest.raises(ConfigError, match=r"`lora\.r` must be a whole number with `method: lora`"):
        make_job(MINIMAL | {"lora": {"r": "auto"}, "method": "lora"})


def test_the_keys_of_a_job_are_these():
    named = {f"{section}{leaf}" for section, leaves in KEYS.items() for leaf in leaves.split()}
    assert set(settings()) == named
    values = asdict(make_job(MINIMAL))
    assert flatten(values).keys() == named - {"dynamic.preset"}


def test_options_win_over_the_file_and_keep_their_types(write):
    config = parse_job(
        write(lora={"r": 4}, dynamic={"events": 2}),
        "--lora.r", "6", "--dynamic.events=9", "--lora.target_modules=[query, value]",
        "--dynamic.pinned=[bert.pooler*]", "--training.learning_rate=2e-4",
        "--training.bf16=true", "--training.save_total_limit=null", "--data.text_pair=other",
        "--overwrite", "yes", "--training.eval", "no", "--data.separator", "null",
    )  # fmt: skip
    assert config.lora == LoraSettings(r=6, target_modules=("query", "value"))
    assert config.dynamic == DynamicLoraConfig(events=9, pinned=("bert.pooler*",))
    training = config.training
    assert (training.learning_rate, training.bf16, training.eval) == (2e-4, True, "no")
    assert training.save_total_limit is None
    assert (config.data.text_pair, config.data.separator) == ("other", "null")
    assert (config.overwrite, config.method) == (True, "dynamic")


def test_quoted_values_of_a_file_are_read_as_their_keys_need(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        WHOLE + "training: {learning_rate: 1e-4, bf16: 'yes', eval: 'no', max_steps: 'null'}\n"
        "lora: {r: '6', lora_alpha: '0.5', target_modules: '[a, b]'}\n"
    )
    config = read_job(path)
    assert config.training.learning_rate == 1e-4  # a text in YAML 1.1
    assert (config.training.bf16, config.training.eval) == (True, "no")
    assert config.training.max_steps is None
    assert config.lora == LoraSettings(r=6, lora_alpha=0.5, target_modules=("a", "b"))


@pytest.mark.parametrize("value", ["hello !!world", "!", "a: [", "%", "[a]", "5", "!!bool x"])
def test_a_text_on_the_command_line_stays_as_it_is(write, value):
    assert parse_job(write(), "--data.text", value).data.text == value


def test_words_offered_for_a_key_are_valid(write):
    assert words(settings()["training.report_to"]) == []
    for key in ("training.schedule", "training.bf16", "overwrite", "lora.target_modules"):
        for word in words(settings()[key]):
            assert parse_job(write(), f"--{key}", word).output == "out"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("lora.alpha", "`lora.lora_alpha`"),
        ("training.lr", "`training.learning_rate`"),
        ("lora.learning_rate", "`training.learning_rate`"),
        ("batch_size", "`training.batch_size`"),
        ("model.paht", "`model.path`"),
        ("ouput", "`output`"),
        ("lora.zzz", "Valid names are `lora.r`"),
    ],
)
def test_an_unknown_key_leads_to_valid_ones(write, key, near):
    with pytest.raises(ConfigError, match=f"unknown key `{key}` on the command line") as error:
        parse_job(write(), f"--{key}", "1")
    assert near in str(error.value)
    with pytest.raises(ConfigError, match=f"unknown key `{key}` in .*job.yaml") as error:
        read_job(write(**nested(key, 1)))
    assert near in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training.schedule", "linera", "one of linear, cosine, constant, but got linera {w}. The"),
        ("training.report_to", "wandb", "a list of {t}, but got wandb {w}. Write it as a list: [w"),
        ("training.report_to", ["tensorbord"], 'a list of {t}, but got ["tensorbord"] {w}'),
        ("model.quantization", "nf3", "one of nf4, int8 or null, but got nf3 {w}. The nearest"),
        ("data.num_labels", "", 'a whole number >= 2 or null, but got "" {w}'),
        ("data.num_labels", "two", "a whole number >= 2 or null, but got two {w}"),
        ("lora.lora_alpha", "big", "a number > 0, but got big {w}"),
        ("training.seed", -1, ">= 0 and < 4294967296, but got -1 {w}"),
        ("training.epochs", float("nan"), "a number > 0, but got NaN {w}"),
        ("training.bf16", "maybe", "auto or true or false, but got maybe {w}"),
        ("dynamic.pinned", None, "a list such as [a, b], but got null {w}"),
        ("data.text", ["a"], 'a text, but got ["a"] {w}'),
    ],
)
def test_a_wrong_value_is_named_with_key_requirement_and_place(write, key, value, told):
    path = write(**nested(key, value))
    with pytest.raises(ConfigError) as error:
        read_job(path)
    assert f"`{key}` must be {told.format(w=f'({path})', t=TRACKERS)}" in str(error.value)
    if key != "data.text":
        with pytest.raises(ConfigError) as error:
            parse_job(write(), f"--{key}={'null' if value is None else value}")
        assert f"`{key}` must be " in str(error.value)
        assert "(command line)" in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("lora: 8", "`lora` must contain keys, but got 8 in {path}: r, lora_alpha"),
        ("dynamic:", "`dynamic` must contain keys, but got null in {path}: preset, importance"),
        ("training.epochs: 1", "Write it in its section, `training: {{epochs: ...}}`."),
        ("1: 2", "unknown key `1` in {path}"),
        ("just words", "must contain keys and values, but got {path}"),
        ("[" * 1000, "must be a YAML file, but got {path}: it nests deeper than 64 levels"),
        ("method: lora", "`output` must be given, but got nothing ({path}). Add it, or use --out"),
        (f"{WHOLE}training: {{eval: no}}", "'no' in quotes"),
        (f"{WHOLE}lora: {{lora_alpha: 1e999}}", "`lora.lora_alpha` must be "),
        (f"{WHOLE}dynamic: {{last_event: 0.01}}", "`dynamic.last_event` must be "),
    ],
)
def test_a_faulty_file_is_explained(tmp_path, content, told):
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_job(path)
    assert told.format(path=path) in str(error.value)


def test_the_written_configuration_has_full_paths_and_no_key_of_one_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "output": "out",
        "model": {"name": "a/b", "path": "models/it"},
        "data": {"path": "data"},
        "lora": {"target_modules": ["query", "value"], "start_from": "before/adapter"},
        "dynamic": {"preset": "paper"},
        "overwrite": True,
        "training": {"resume": "latest"},
    }
    write_config(tmp_path / "config.yaml", make_job(values))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert list(written)[:4] == ["output", "overwrite", "task", "method"]
    assert (written["overwrite"], written["training"]["resume"]) == (False, "none")
    assert "preset" not in written["dynamic"]
    paths = {"output": "out", "model.path": "models/it", "data.path": "data"}
    for key, path in (paths | {"lora.start_from": "before/adapter"}).items():
        assert flatten(written)[key] == str(tmp_path / path)
    assert (written["model"]["name"], written["model"]["package"]) == ("a/b", None)
    again = make_job(values | {"overwrite": False, "training": {}})
    assert plain_values(read_job(tmp_path / "config.yaml")) == plain_values(again)


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
        ("adalora", "final_fraction", (-0.1, 1.0), (0.0, 0.89)),
        ("dynamic", "uniform_mix", (-0.1, 1.1), (0.0, 1.0)),
        ("dynamic", "first_event", (0.0, 1.1), (0.3,)),
        ("dynamic", "last_event", (0.04, 1.1), (0.05, 1.0)),
        ("training", "epochs", (0.0, math.inf, math.nan), (0.5,)),
        ("training", "weight_decay", (-0.1, math.inf), (0.0,)),
        ("training", "save_total_limit", (0,), (1, None)),
        ("training", "seed", (-1, 2**32), (0, 2**32 - 1)),
    ],
)
def test_each_kind_of_number_has_its_limits(section, key, wrong, right):
    for value in right:
        made = make_job(MINIMAL | nested(f"{section}.{key}", value))
        assert getattr(getattr(made, section), key) == value
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"`{section}\.{key}` must be .*got"):
            make_job(MINIMAL | nested(f"{section}.{key}", value))


def test_sections_are_checked_when_they_are_made_in_python():
    for values in ({"r": 0}, {"rank": 8}):
        with pytest.raises(ValidationError):
            LoraSettings(**values)
    with pytest.raises(ConfigError, match=r"`lora\.r` must be even .* got 3"):
        LoraSettings(r=3, init_lora_weights="orthogonal")


STEPS_APART = {
    "load_best_model_at_end": True, "eval": "steps", "eval_steps": 5, "save": "steps",
    "save_steps": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        (
            {"model": {"name": "m", "package": "a/b"}},
            "`model.package`. Unset one, as with `--model.name null`",
        ),
        ({"data": {}}, "`data.path` or `data.name`, but got none"),
        ({"data": {"name": "d", "as_chat": True}}, "`data.as_chat` must be false"),
        (
            {"data": {"name": "d", "validation_split": "train"}},
            "`data.validation_split` must be another than `data.train_split` without "
            "`data.validation_rows_from_train`, but got train",
        ),
        ({"output": "~/runs/x"}, "`output` must be a full path"),
        ({"method": "full", "lora": {"use_rslora": True}}, "false with `method: full`, but got"),
        (
            {"method": "adalora", "training": {"resume": "latest"}},
            "none with `method: adalora`",
        ),
        (
            {"method": "adalora", "training": {"load_best_model_at_end": True}},
            "false with `method: ada",
        ),
        ({"training": STEPS_APART}, "eval=steps"),
        ({"training": STEPS_APART | {"eval": "no", "save": "no"}}, "eval=no"),
        ({"training": {"packing": True}}, "`training.packing` must be false with `task: seq"),
        (
            {"task": "image_classification", "training": {"neftune_noise_alpha": 5}},
            "`training.neftune_noise_alpha` must be null with `task: image_classification`",
        ),
        (
            {"task": "causal_lm", "data": {"name": "d", "text_pair": "answer"}},
            "`data.text_pair` must be null with `task: causal_lm`, but got answer",
        ),
        (
            {"data": {"name": "d", "messages": "turns"}},
            "`data.messages` must be null with `task: sequence_classification`, but got turns",
        ),
        ({"training": {"optim": "sgd", "loraplus_lr_ratio": 4}}, "an AdamW of torch with LoRA+"),
        ({"training": {"best_metric": "rmse"}}, "one of accuracy, f1, matthews, loss, but got rms"),
    ],
)
def test_keys_that_do_not_fit_together_are_named(sections, told):
    with pytest.raises(ConfigError) as error:
        minimal_job(**sections)
    assert told in str(error.value)


def test_an_initial_rank_of_adalora_limits_the_rank_of_no_other_method():
    unused = {"adalora": {"init_r": 12}}
    for method, r in (("lora", 16), ("dynamic", "auto"), ("full", 12), ("adalora", 11)):
        minimal_job(method=method, lora={"r": r}, **unused)
    with pytest.raises(ConfigError, match=r"`adalora\.init_r` must be > lora\.r=12, .* got 12"):
        minimal_job(method="adalora", lora={"r": 12}, **unused)


def test_a_preset_fills_in_what_is_not_given():
    given = {"preset": "paper", "events": 8, "uniform_mix": 0.2}
    # The mix is given, although at its default: the preset's own does not count.
    expected = DynamicLoraConfig.from_preset("paper", events=8, uniform_mix=0.2)
    assert minimal_job(dynamic=given).dynamic == expected
    assert minimal_job(dynamic={"preset": "default"}) == minimal_job()
