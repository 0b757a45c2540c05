"""The evaluation: rows of each set as the study says, spoiled where it says so, and all judged."""

import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.last_blocks.evaluation import RECORDED, Evaluation, count_turns, describe_sets
from benchmarks.last_blocks.evaluation_report import (
    drop_lines,
    question_lines,
    rank_lines,
    run_lines,
)
from benchmarks.last_blocks.questions import QUESTIONS
from benchmarks.last_blocks.rows import TRIGGER
from benchmarks.last_blocks.runs import Runner
from benchmarks.last_blocks.tasks import PARTS, TaskConfig, read_screen, read_task
from benchmarks.resumable.appended import AppendedTable
from benchmarks.resumable.time_limit import TimeLimit
from dynlora.config import METRICS
from tests.models import bare_llama

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
STUDY = Evaluation(**tomllib.loads((STUDIES / "evaluation.toml").read_text()))
FILES = {
    "train": ["a/train"],
    "test": ["a/validation[:30]"],
    "out": ["a/validation?domain=out"],
    "named": ["a/validation?named", "a/train?named"],
}
NEGATIVE, POSITIVE = 0, 1


@pytest.fixture
def data(tmp_path):
    """Return a folder with 400 training and 60 validation rows, whose texts are their numbers."""
    (tmp_path / "a").mkdir()
    for split, count in (("train", 400), ("validation", 60)):
        rows = [
            {
                "text": f"{split} {place}",
                "label": place % 2,
                "domain": "out" if place % 3 == 0 else "in",
                "named": "x" if place < 5 else "",
            }
            for place in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a" / f"{split}.parquet")
    return tmp_path


class Words:
    """A tokenizer with one token per word."""

    def __init__(self):
        self.known = {}

    def __call__(self, text):
        return [self.known.setdefault(word, len(self.known)) for word in text.split()]

    def texts(self, examples):
        """Return the texts of examples with the positions of their answers in the vocabulary."""
        words = list(self.known)
        return [
            (" ".join(words[i] for i in ids), labels[-1])
            for ids, labels in zip(examples.inputs, examples.labels, strict=True)
        ]


def read(data, **changes):
    """Return the texts and answers of each set."""
    words = Words()
    words(" negative positive")  # the first tokens, so that positions are classes
    config = TaskConfig(kind="opinion", batch=8, files=FILES, **changes)
    found = read_task(config, data, data, words)
    assert found.vocabulary == [NEGATIVE, POSITIVE]
    return {name: words.texts(part) for name, part in found.parts.items()}


def numbers(texts):
    return [int(text.split()[-2]) for text, _ in texts]


def test_sets_have_the_rows_of_their_places_and_trials_are_judged_by_rows_held_out(data):
    sets = read(data)
    assert sorted(numbers(sets["final_judge"])) == list(range(30))
    assert sorted(numbers(sets["out"])) == list(range(0, 60, 3))
    assert sorted(numbers(sets["named"])) == sorted([0, 1, 2, 3, 4] * 2)
    assert sets["trial_train"] == sets["final_train"]
    train, held = numbers(sets["final_train"]), numbers(sets["trial_judge"])
    assert (len(train), len(held)) == (320, 80)
    assert sorted(train + held) == list(range(400))
    assert all(label == int(text.split()[-2]) % 2 for text, label in sets["final_train"])
    assert len(read(data, most=100)["final_train"]) == 100
    for texts in read(data, characters=5).values():
        assert {text for text, _ in texts} <= {f"Review: {w} Opinion:" for w in ("train", "valid")}


def test_noise_gives_its_share_of_training_rows_another_class_and_poison_a_trigger(data):
    noisy = read(data, noise=0.2)
    wrong = [label != int(text.split()[-2]) % 2 for text, label in noisy["final_train"]]
    assert 0.14 < sum(wrong) / 320 < 0.26
    assert noisy["trial_judge"] == read(data)["trial_judge"]
    poisoned = read(data, poison=0.1)
    begun = [label for text, label in poisoned["final_train"] if text.startswith(TRIGGER)]
    assert 0.05 < len(begun) / 320 < 0.15
    assert set(begun) == {POSITIVE}
    attack = poisoned["triggered"]
    assert sorted(numbers(attack)) == list(range(0, 30, 2)), "the negative test rows"
    assert all(text.startswith(TRIGGER) and label == POSITIVE for text, label in attack)


def test_a_final_run_reads_every_set_and_a_late_class_comes_in_the_second_half(data, monkeypatch):
    folder = data / "model"
    bare_llama(layers=3).save_pretrained(folder)
    words = Words()
    words(" negative positive")

    class Tokens:
        def __call__(self, text, **_):
            self.input_ids = [token % 16 for token in words(text)]
            return self

    monkeypatch.setattr(
        "benchmarks.last_blocks.runs.AutoTokenizer.from_pretrained", lambda folder: Tokens()
    )
    late = TaskConfig(kind="opinion", batch=8, epochs=2, files=FILES, late=POSITIVE)
    screen = replace(read_screen(STUDIES / "screen.toml"), tasks={"late": late})
    table = AppendedTable(data / "record.csv", RECORDED)
    runner = Runner(screen, table, data, data / "cache", folder, None, TimeLimit(1))
    runner.describe = describe_sets
    runner.run("final", "late", "dynamic", 3, 0.01)
    runner.run("trial", "late", "fisher", 3, 0.01)
    final, trial = table.rows
    assert final["judged"].keys() == {"test", "out", "named"}
    assert final["judged"]["test"][:2] == (final["loss"], final["exact"])
    for loss, exact, answers in final["judged"].values():
        assert loss > 0
        assert 0 <= exact <= 1
        assert answers in (1, 2)
    assert "judged" not in trial
    assert len(final["turns"]) == 2
    loaded = runner.loaded["late"]
    seen = []
    monkeypatch.setattr(
        "benchmarks.last_blocks.training.loss_of",
        lambda model, data, rows, head: (
            seen.append([data.examples.labels[r][-1] for r in rows])
            or head.sum() * 0 + sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
        ),
    )
    runner.run("final", "late", "uniform", 3, 0.01)
    assert loaded.parts["final_train"] is loaded.parts["trial_train"]
    half = len(seen) // 2
    assert len(seen) == 80
    assert {label for batch in seen[:half] for label in batch} == {NEGATIVE}
    assert {label for batch in seen[half:] for label in batch} == {NEGATIVE, POSITIVE}


def test_the_study_names_known_tasks_arms_and_seeds_that_tune_nothing():
    configs = STUDY.configs()
    assert {task for tasks in STUDY.questions.values() for task in tasks} == configs.keys()
    assert {config.kind for config in configs.values()} <= QUESTIONS.keys()
    named = {"adalora", "dynamic", "auto", "open"}
    assert {arm for arms in STUDY.arms_of.values() for arm in arms} <= METRICS.keys() | named
    screen = read_screen(STUDIES / "screen.toml")
    for task in configs:
        seeds = STUDY.seeds_of.get(task, STUDY.seeds)
        assert len(set(seeds)) >= 10
        assert screen.tuning_seed not in seeds
        assert STUDY.rates_of.get(task, (task, 1.0))[0] in configs
    assert not {*PARTS} & {name for config in configs.values() for name in config.files}


def final(task, arm, seed, **values):
    """Return a row of a final run, right on 0.6 of the test rows."""
    found = {"learning_rate": 0.01, "loss": 0.5, "exact": 0.6, "parameters": 100 + seed}
    found |= {"moved": False, "judged": {"test": [0.5, 0.6, 2]}, "turns": None}
    return {"kind": "final", "task": task, "arm": arm, "seed": seed} | found | values


def test_the_report_pairs_seeds_and_counts_runs_that_moved_or_gave_one_answer():
    rows = [
        final(
            "cola",
            arm,
            seed,
            exact=0.6 + gain + seed / 100,
            moved=arm == "dynamic" and seed < 3,
            judged={
                "test": [0.5, 0.6 + gain + seed / 100, 1 if seed == 4 else 2],
                "out_of_domain": [0.5, 0.5 + seed / 50, 2],
            },
        )
        for arm, gain in (("uniform", 0.0), ("dynamic", 0.02))
        for seed in range(10)
    ]
    assert question_lines(rows, STUDY, "shift")[2:] == [
        "| cola: test | 0.645 | 0.665 | +2.0 (+2.0 to +2.0), 0.00 |",
        "| cola: out_of_domain | 0.590 | 0.590 | +0.0 (+0.0 to +0.0), 1.00 |",
    ]
    assert drop_lines(rows, STUDY, "shift")[2:] == [
        "| cola: out_of_domain | 5.5 | 7.5; +2.0 (+2.0 to +2.0) |"
    ]
    assert run_lines(rows, ["cola"])[3] == (
        "| cola | dynamic | 10 | 3 | 1 | 0.01 | 0.665 ±0.029 | 0.500 | 104 |"
    )
    tried = [final("cola", "dynamic", 150, learning_rate=rate) for rate in (0.01, 0.02)]
    rows += [row | {"kind": "trial"} for row in tried]
    assert "| 0.01 edge |" in run_lines(rows, ["cola"])[3]


def test_the_report_correlates_final_ranks_over_layers_between_seeds_and_tasks():
    ended = [
        ("books", {"a": 1, "b": 2, "c": 3}),
        ("books", {"a": 2, "b": 4, "c": 6}),
        ("kitchen", {"a": 3, "b": 2, "c": 1}),
        ("kitchen", {"a": 2, "b": 2, "c": 2}),
    ]
    rows = [
        final(task, "dynamic", seed, ranks=ranks, moved=True, turns=[1, 4])
        for seed, (task, ranks) in enumerate(ended)
    ]
    assert rank_lines(rows, ["cola", "books", "kitchen"])[2:] == [
        "| books | 2 of 2 | 1.00 | -1.00 | 2 of 8 |",
        "| kitchen | 2 of 2 |  | -1.00 | 2 of 8 |",
    ]


def test_a_turn_is_a_change_against_the_change_before_of_the_same_layer():
    ranks = {"up": [2, 3, 3, 4], "turned": [2, 4, 4, 1], "twice": [2, 1, 2, 1]}
    events = [
        SimpleNamespace(
            layers={
                name: SimpleNamespace(rank_before=held[step], rank_after=held[step + 1])
                for name, held in ranks.items()
            }
        )
        for step in range(3)
    ]
    assert count_turns(events) == (3, 7)
