"""Classes have names from folders, texts of a label column or a data set, and else numbers."""

import json
import shutil

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from dynlora.cli.main import main
from tests.cli.finished import facts, read_json, read_lines, run_job
from tests.jobs import WORDS, job_values, make_rows, missing, write_rows
from tests.pictures import save_class_folders, save_vit

NAMES = ("ants", "bees", "wasps")


def train(root, data, folder, *options, steps=1):
    values = job_values(root / "vit", data, folder / "run") | {"task": "image_classification"}
    values["training"]["max_steps"] = steps
    return run_job(folder, values, *options)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Return a folder with a finished run on three classes, and its data; no test may change it."""
    root = tmp_path_factory.mktemp("named")
    for split, count in (("train", 12), ("validation", 6)):
        save_class_folders(root / "data" / split, count, NAMES)
    save_vit(root / "vit")
    train(root, root / "data", root, steps=2)
    return root


@pytest.fixture
def part(root, tmp_path):
    """Return a folder whose split `test` has only two of the classes, and no other split."""
    for name in NAMES[1:]:
        shutil.copytree(root / "data" / "validation" / name, tmp_path / "part" / "test" / name)
    return tmp_path / "part"


def test_a_run_and_a_merged_model_have_the_names(root, tmp_path, said):
    run = facts(root / "run")
    assert run["class_names"] == [*NAMES]
    assert run["rows"] == {"train": 12, "validation": 6}
    merged = ("--format", "merged", "--output", tmp_path / "m")
    said("export", root / "run" / "adapter", *merged)
    config = read_json(tmp_path / "m" / "config.json")
    assert [*config["id2label"].values()] == [*config["label2id"]] == [*NAMES]


def test_a_split_without_some_class_changes_no_number(root, part, tmp_path, said):
    found = said("eval", root / "run", "--data", part, "--split", "test")
    assert [row["labelled"] for row in found["classes"]] == [0, 2, 2]
    assert [row["name"] for row in found["classes"]] == [*NAMES]
    predicted = said("predict", root / "run", part / "test")["predictions"]
    right = sum(row["prediction"] == n for row, n in zip(predicted, [1, 1, 2, 2], strict=True))
    assert found["metrics"]["accuracy"] == right / 4
    # So has a third split of the run's own folder.
    run = shutil.copytree(root / "run", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(root / "data"), str(part)))
    assert said("eval", run, "--split", "test")["classes"] == found["classes"]


def test_folders_that_are_no_classes_of_the_run_are_refused(root, part, tmp_path, refused):
    shutil.copytree(part / "test" / "bees", part / "test" / "flies")
    line = refused("eval", root / "run", "--data", part, "--split", "test")
    assert missing(line, "one of the classes ants, bees, wasps | 'flies' in row 2") == []
    run = shutil.copytree(root / "run", tmp_path / "run")
    values = facts(run)
    (run / "run.json").write_text(json.dumps(values | {"class_names": None}))
    assert "a whole number in every row" in refused("eval", run, "--data", part, "--split", "test")
    (run / "run.json").write_text(json.dumps(values | {"class_names": [1]}))
    assert "`class_names.0`" in refused("eval", run)


def test_a_folder_of_images_is_predicted_by_path_with_names(root, tmp_path, capsys, refused):
    shutil.copytree(root / "data" / "validation", tmp_path / "some" / "deep")
    shutil.copytree(root / "data" / "validation", tmp_path / "some" / ".hidden")
    (tmp_path / "some" / "notes.txt").write_text("none")
    capsys.readouterr()
    assert main(["predict", str(root / "run"), str(tmp_path / "some")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    paths = sorted(str(p.relative_to(tmp_path / "some")) for p in tmp_path.glob("some/deep/*/*"))
    assert len(paths) == 6
    assert [row["image"] for row in rows] == paths
    assert all(row["class_name"] == NAMES[row["prediction"]] for row in rows)
    assert list(rows[0]) == ["image", "prediction", "class_name", "probabilities"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "at least 1 row, got 0" in refused("predict", root / "run", empty)


def test_images_come_as_paths_in_a_list_too(root, tmp_path):
    data = shutil.copytree(root / "data", tmp_path / "data")
    for split in ("train", "validation"):
        rows = [
            {"image": str(image.relative_to(data)), "label": NAMES.index(image.parent.name)}
            for image in sorted((data / split).rglob("*.jpg"))
        ]
        write_rows(data / f"{split}-list.csv", rows)
    lists = ("--data.train_split=train-list", "--data.validation_split=validation-list")
    run = train(root, data, tmp_path, *lists, steps=12)
    assert facts(run)["rows"] == {"train": 12, "validation": 6}
    assert facts(run)["metrics_after"]["loss"] < facts(run)["metrics_before"]["loss"]


def test_a_class_of_which_no_row_is_read_has_an_output_too(root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    for image in (tmp_path / "data" / "train" / NAMES[-1]).iterdir():
        image.unlink()
    assert facts(train(root, tmp_path / "data", tmp_path))["num_labels"] == 3


MOODS = ("bad", "good")


def text_rows(task, count=40):
    """Return rows with classes in words: whether a text names red, or whether each word is red."""
    rows = make_rows(count)
    for row in rows:
        words = row["text"].split()
        each = [MOODS[word == "red"] for word in words]
        row["label"] = MOODS[row["label"]]
        if task == "multi_label":
            row["label"] = sorted({*each})
        if task == "token_classification":
            row |= {"text": words, "label": each}
    return rows


@pytest.mark.parametrize("task", ["sequence_classification", "multi_label", "token_classification"])
def test_classes_as_texts_are_learned_and_predicted_by_name(task, model, tmp_path, said):
    ending = ".csv" if task == "sequence_classification" else ".jsonl"
    mine = write_rows(tmp_path / f"mine{ending}", text_rows(task))
    run = run_job(tmp_path, job_values(model, mine, tmp_path / "run") | {"task": task})
    assert (facts(run)["class_names"], facts(run)["num_labels"]) == ([*MOODS], 2)
    assert facts(run)["metrics_after"]["loss"] < facts(run)["metrics_before"]["loss"]
    said("predict", run, mine, "--output", tmp_path / "said.jsonl")
    for row in read_lines(tmp_path / "said.jsonl"):
        given = row["prediction"] if isinstance(row["prediction"], list) else [row["prediction"]]
        named = row["class_name"] if isinstance(row["class_name"], list) else [row["class_name"]]
        assert [MOODS[number] for number in given] == named
    part = write_rows(tmp_path / "part.jsonl", [r for r in text_rows(task) if "bad" in r["label"]])
    found = said("eval", run, "--data", part)
    if task == "sequence_classification":
        counts = [(row["name"], row["labelled"]) for row in found["classes"]]
        assert counts == [("bad", 20), ("good", 0)]


ORDERS = {"train": ["good", "1", "bad"], "validation": ["1", "bad", "good"]}


def save_class_numbers(folder):
    """Write and return splits of class numbers, whose names differ in order; bad is not trained."""
    words, splits = {"train": ["good", "1"] * 12, "validation": ["good", "1", "bad"] * 2}, {}
    for split, order in ORDERS.items():
        columns = {"text": [row["text"] for row in make_rows(len(words[split]))]}
        columns["label"] = [order.index(word) for word in words[split]]
        kinds = Features(text=Value("string"), label=ClassLabel(names=order))
        splits[split] = Dataset.from_dict(columns, kinds)
        splits[split].to_parquet(folder / f"{split}.parquet")
    return splits


@pytest.mark.parametrize("source", ["files", "hub"])
def test_class_numbers_keep_the_names_and_order_of_their_data_set(
    source, model, tmp_path, said, monkeypatch
):
    splits = save_class_numbers(tmp_path / "data")
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset, split: splits[split])
    values = job_values(model, tmp_path / "data", tmp_path / "run")
    if source == "hub":
        values["data"]["name"] = f"owner/{values['data'].pop('path').replace('/', '-')}"
    run = run_job(tmp_path, values)
    assert (facts(run)["class_names"], facts(run)["num_labels"]) == (ORDERS["train"], 3)
    counts = [(row["name"], row["labelled"]) for row in said("eval", run)["classes"]]
    assert counts == [("good", 2), ("1", 2), ("bad", 2)]


def test_class_numbers_that_are_learned_as_numbers_have_no_names(model, tmp_path, said):
    save_class_numbers(tmp_path / "data")
    values = job_values(model, tmp_path / "data", tmp_path / "run") | {"task": "regression"}
    run = run_job(tmp_path, values, "--training.max_steps", 1)
    assert facts(run)["class_names"] is None
    found = said("predict", run, tmp_path / "data" / "validation.parquet")["predictions"]
    assert [set(row) for row in found] == [{"prediction"}] * 6


def test_a_whole_model_has_the_names_of_its_classes(model, tmp_path):
    mine = write_rows(tmp_path / "mine.csv", text_rows("sequence_classification"))
    run = run_job(tmp_path, job_values(model, mine, tmp_path / "run"), "--method", "full")
    assert read_json(run / "model" / "config.json")["id2label"] == {"0": "bad", "1": "good"}


def test_a_label_that_is_no_class_is_refused_with_the_classes(model, tmp_path, refused):
    rows = text_rows("sequence_classification")
    mine = write_rows(tmp_path / "mine.csv", rows)
    run = run_job(tmp_path, job_values(model, mine, tmp_path / "run"))
    wrong = write_rows(tmp_path / "wrong.csv", [rows[0], rows[1] | {"label": "Bad"}])
    line = refused("eval", run, "--data", wrong)
    told = "must hold one of the classes bad, good in every row | 1 of 2 rows | 'Bad' in row 1"
    assert missing(line, told) == []
    for number, row in enumerate(rows):
        row["label"] = f"{WORDS[number % 11]} {number}"
    write_rows(mine, rows)
    job = ("train", tmp_path / "job.yaml", "--output", tmp_path / "more")
    assert missing(refused(*job), "40 different texts for 36 labels | `data.label`") == []
