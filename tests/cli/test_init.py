"""From rows to a report: a CONFIG from five answers, examples, a model card, an upload."""

import io
import shlex
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import yaml
from huggingface_hub.errors import HFValidationError
from jsonschema import Draft202012Validator

from dynlora.cli.examples import FOLDERS
from dynlora.cli.main import main
from dynlora.train.config import METRICS
from dynlora.train.config.keys import job_schema
from dynlora.train.config_file import read_job
from tests.adapters import save_adapter
from tests.cli.finished import facts, load_by_card, read_json
from tests.jobs import make_rows, missing, snapshot, write_rows
from tests.language import make_pairs, save_language_model

ANSWERS = {"--memory": "small", "--time": "try"}


def words(**answers):
    given = ANSWERS | {f"--{key}": value for key, value in answers.items()}
    return [str(word) for pair in given.items() for word in pair]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_table_with_classes_in_words_becomes_a_report(here, model, capsys):
    rows = make_rows(40)
    named = [{"Review": row["text"], "sentiment": ("bad", "good")[row["label"]]} for row in rows]
    write_rows(here / "mine.csv", named)
    given = words(task="sequence_classification", data="mine.csv", model=model)
    short = ["--data.max_length", "16", "--training.max_steps", "2"]
    for command in (
        ["init", *given],
        ["train", "job.yaml", *short],
        ["report", "runs/job"],
        ["predict", "runs/job", "mine.csv", "--output", "said.csv"],
    ):
        assert main(command) == 0, capsys.readouterr().err
    assert facts(here / "runs" / "job")["class_names"] == ["bad", "good"]
    assert (here / "runs" / "job" / "report.html").is_file()
    assert set((here / "said.csv").read_text().split()) & {"bad", "good"} == set()
    assert ',"good",' in (here / "said.csv").read_text()


@pytest.mark.parametrize("task", METRICS)
def test_the_answers_of_every_task_make_a_valid_commented_file(task, here, capsys):
    assert main(["init", *words(task=task, data="owner/rows", model="owner/model")]) == 0
    Draft202012Validator(job_schema()).validate(yaml.safe_load((here / "job.yaml").read_text()))
    made = read_job(here / "job.yaml")
    assert (made.task, made.data.name, made.model.name) == (task, "owner/rows", "owner/model")
    training = made.training
    assert (training.batch_size, training.gradient_accumulation) == (4, 8)
    assert training.activation_checkpointing
    assert training.max_steps == 50
    assert (here / "job.yaml").read_text().count("#") > 8


@pytest.mark.parametrize(
    ("task", "rows", "keys"),
    [
        ("causal_lm", {"input": "a", "output": "b", "instruction": "c"}, "path=rows.json"),
        ("causal_lm", {"story": "a"}, "text=story"),
        ("sequence_classification", {"id": 1, "Title": "a", "intent": "b"}, "text=Title label=in"),
        ("regression", {"remark": "a", "stars": 2}, "text=remark label=stars"),
        (
            "token_classification",
            {"id": 1, "tokens": ["a"], "pos_tags": [1], "ner_tags": [0]},
            "text=tokens label=ner_tags",
        ),
        ("image_classification", {"file": "a.png", "kind": "b"}, "image=file label=kind"),
    ],
)
def test_columns_are_found_by_their_names(task, rows, keys, here):
    write_rows(here / "rows.json", [rows] * 4)
    assert main(["init", *words(task=task, data="rows.json", model="owner/model")]) == 0
    found = yaml.safe_load((here / "job.yaml").read_text())["data"]
    assert missing(" ".join(f"{key}={value}" for key, value in found.items()), *keys.split()) == []


def test_columns_without_a_usual_name_are_not_guessed_among_several(here):
    write_rows(here / "rows.json", [{"id": 1, "remark": "a", "stars": 2, "score": 3}] * 4)
    assert main(["init", *words(task="regression", data="rows.json", model="owner/model")]) == 0
    found = yaml.safe_load((here / "job.yaml").read_text())["data"]
    assert (found["label"], "text" in found) == ("score", False)


def test_answers_at_the_questions_make_the_same_file(here, capsys, monkeypatch, refused):
    answers = ["causal_lm", "owner/rows", "owner/model", "small", "try"]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{answer}\n" for answer in answers)))
    assert main(["init", "--output", "asked.yaml"]) == 0
    capsys.readouterr()
    given = words(task=answers[0], data=answers[1], model=answers[2])
    assert main(["init", *given, "--output", "given.yaml"]) == 0
    asked, told = (Path(f"{name}.yaml").read_text() for name in ("asked", "given"))
    assert asked == told.replace("given", "asked")
    assert "`--output` must be a new file" in refused("init", *given, "--output", "asked.yaml")
    interrupted = Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr("click.termui.visible_prompt_func", interrupted)
        assert main(["init"]) == 130
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words_of_one = ("init", "--task", "causal_lm", "--output", "one.yaml")
    assert "`--data` must be given without a terminal" in refused(*words_of_one)


@pytest.mark.parametrize("name", ["a: b.yaml", "job #2.yaml", "it's 5 o'clock.yaml"])
def test_a_file_of_any_name_says_where_its_run_goes_and_how_to_start_it(here, capsys, name):
    given = words(task="causal_lm", data="owner/rows", model="__main__")
    assert main(["init", *given, "--output", name]) == 0
    assert yaml.safe_load((here / name).read_text())["output"] == f"runs/{Path(name).stem}"
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == name
    assert main(["examples", "mrpc", "--output", f"copy of {name}"]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == f"copy of {name}"


def test_examples_are_listed_and_copied_with_their_data(here, said, refused):
    folder = FOLDERS[-1]
    assert {*said("examples")} == {path.stem for path in folder.glob("*.yaml")}
    assert said("examples", "quickstart")["output"] == "quickstart.yaml"
    assert Path("quickstart.yaml").read_text() == (folder / "quickstart.yaml").read_text()
    copied = snapshot(Path("examples/stdlib"))
    assert [*copied.values()] == [*snapshot(folder / "stdlib").values()]
    assert said("examples", "mrpc", "--output", "my/own.yaml")["output"] == "my/own.yaml"
    assert "which exists" in refused("examples", "quickstart", "--output", "again.yaml")
    assert missing(refused("examples", "mrcp"), "NAME must be one of | mrpc") == []


def test_a_card_tells_what_an_adapter_is_and_its_code_loads_it(here, tmp_path, capsys):
    model = save_language_model(tmp_path / "model")
    write_rows(here / "rows.json", make_pairs(24))
    given = words(task="causal_lm", data="rows.json", model="model")
    assert main(["init", *given]) == 0
    options = ("--data.text", "ask", "--data.max_length", "32", "--training.max_steps", "2")
    unread = ("--data.name", "owner/rows")  # because the path wins
    assert main(["train", "job.yaml", *options, *unread, "--data.max_new_tokens", "4"]) == 0
    card = (here / "runs" / "job" / "adapter" / "README.md").read_text()
    run = facts(here / "runs" / "job")
    assert "More Information Needed" not in card
    data = yaml.safe_load(card.split("---")[1])
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-generation")
    assert {"dynlora", "lora"} <= {*data["tags"]}
    loss = [f"{run[f'metrics_{when}']['loss']:.4f}" for when in ("before", "after")]
    told = (
        f"| loss | {loss[0]} | {loss[1]} |",
        f", {run['parameters']['end']:,} parameters |",
        "vllm serve",
        "| data | local files, ",
    )
    assert missing(card, *told) == []
    assert (here / "runs" / "job" / "adapter" / "ranks.png").read_bytes()[:4] == b"\x89PNG"
    loaded = load_by_card(here / "runs" / "job" / "adapter").peft_config["default"]
    assert loaded.r == read_json(here / "runs" / "job" / "adapter" / "adapter_config.json")["r"]
    assert model.is_dir()


def test_a_result_is_uploaded_to_a_repository(here, tmp_path, said, capsys, monkeypatch):
    sent, url = [], SimpleNamespace(repo_id="me/mine")

    class Hub:
        def create_repo(self, repository, **options):
            if repository != "me/mine":
                raise HFValidationError("no such name")
            assert options == {"private": True, "exist_ok": True}
            return url

        def upload_folder(self, *, repo_id, folder_path):
            sent.append((repo_id, {path.name for path in folder_path.iterdir()}))

        def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
            sent.append((repo_id, path_or_fileobj, path_in_repo))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    save_adapter(tmp_path / "given", "patterns")
    options = ("export", tmp_path / "given", "--format", "uniform", "--push_to_hub")
    said(*options, "me/mine", "--output", tmp_path / "made")
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert sent.pop() == ("me/mine", files)
    kohya = ("export", tmp_path / "given", "--format", "kohya", "--component", "unet")
    file = tmp_path / "[x]*.safetensors"  # would be a pattern in `allow_patterns`
    said(*kohya, "--push_to_hub", "me/mine", "--output", file)
    assert sent == [("me/mine", file, file.name)]
    wrong = [*options, "a b", "--output", tmp_path / "more"]
    assert main([str(word) for word in wrong]) == 2
    told = "`--push_to_hub` must be a repository | a b (no such name) | hf auth login"
    assert missing(capsys.readouterr().err, told) == []
