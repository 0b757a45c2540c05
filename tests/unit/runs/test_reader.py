"""A run's folder as one value, and what is said of folders that are none."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dynlora.errors import AdapterError, RunFileError
from dynlora.runs.reader import read_run
from tests.unit.report.runs import block_names, make_events, run_values, write_run

NAMES = block_names(2)
EVENTS = make_events(NAMES, [10, 20])


def test_a_finished_run_is_read_whole(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", events=EVENTS))
    assert (run.status, run.method, run.seed, run.steps) == ("finished", "dynamic", 0, 100)
    assert run.before == {"pearson": 0.125, "loss": 0.75}
    assert run.after == {"pearson": 0.625, "loss": 0.5}
    assert (run.budget, run.parameters["end"]) == (10_000, 9_876)
    assert run.memory == {"peak_memory_bytes": 3 * 2**30, "peak_gpu_memory_bytes": None}
    assert run.config["lora"] == {"r": 8, "lora_alpha": 16.0}
    assert list(run.events) == EVENTS
    assert run.initial_ranks == dict.fromkeys(NAMES, 8)
    assert run.final_ranks == {n: layer.rank_after for n, layer in EVENTS[-1].layers.items()}
    assert run.notes == []


def test_events_after_the_best_checkpoint_are_left_out_and_told(tmp_path: Path) -> None:
    ranks = {name: layer.rank_after for name, layer in EVENTS[0].layers.items()}
    values = run_values(final_ranks=ranks, best_step=10)
    run = read_run(write_run(tmp_path / "run", events=EVENTS, run=values))
    assert list(run.events) == EVENTS[:1]
    assert run.final_ranks == ranks
    (note,) = run.notes
    assert note == "The adapter is that of step 10, the best checkpoint: 1 later event is left out."


def test_ranks_of_a_run_without_event_are_those_it_ended_with(tmp_path: Path) -> None:
    values = run_values(final_ranks={"a": 4, "b": 6})
    run = read_run(write_run(tmp_path / "run", run=values))
    assert run.initial_ranks == run.final_ranks == {"a": 4, "b": 6}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    root = write_run(tmp_path / "run", run=run_values(method="lora", final_ranks={}))
    (root / "adapter").mkdir()
    return root


def test_ranks_of_plain_lora_come_from_its_adapter_in_the_order_of_blocks(plain: Path) -> None:
    tensors = {}
    for block, rank in ((2, 5), (10, 7), (0, 3)):
        name = f"base_model.model.m.layers.{block}.q"
        tensors[f"{name}.lora_A.weight"] = np.zeros((rank, 16), np.float32)
        tensors[f"{name}.lora_B.weight"] = np.zeros((16, rank), np.float32)
    tensors["base_model.model.embed.lora_embedding_A"] = np.zeros((2, 30), np.float32)
    tensors["base_model.model.conv.lora_A.weight"] = np.zeros((6, 3, 2, 2), np.float32)
    tensors["base_model.model.classifier.weight"] = np.zeros((2, 16), np.float32)
    save_file(tensors, plain / "adapter" / "adapter_model.safetensors")
    run = read_run(plain)
    assert run.initial_ranks == {}
    assert list(run.final_ranks.items()) == [
        ("conv", 6), ("embed", 2),
        ("m.layers.0.q", 3), ("m.layers.2.q", 5), ("m.layers.10.q", 7),
    ]  # fmt: skip


def test_a_broken_or_hostile_adapter_is_named(plain: Path) -> None:
    path = plain / "adapter" / "adapter_model.safetensors"
    path.write_bytes(b"\x10\x00\x00")
    with pytest.raises(RunFileError, match=r"adapter_model\.safetensors of 3 bytes"):
        read_run(plain)
    save_file({f"{'x' * 1_000_000}.lora_A.weight": np.zeros((2, 3), np.float32)}, path)
    with pytest.raises(AdapterError, match=r"at most 2000 characters.* 1000014"):
        read_run(plain)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("running", "is still running, or was killed"),
        ("failed", "ended with an error after 100 steps: ValueError: it broke"),
    ],
)
def test_an_unfinished_run_is_read_as_far_as_it_went(
    tmp_path: Path, status: str, told: str
) -> None:
    extra = {"error": "ValueError: it broke"} if status == "failed" else {}
    values = run_values(status=status, metrics_after=None, steps=None, seconds=None, **extra)
    run = read_run(write_run(tmp_path / "run", events=EVENTS, run=values))
    assert run.steps == 100, "the newest step that was logged"
    late = [*EVENTS, replace(EVENTS[-1], step=137)]
    assert read_run(write_run(tmp_path / "late", events=late, run=values)).steps == 137
    assert run.after == {}
    assert run.final_ranks[NAMES[0]] == EVENTS[-1].layers[NAMES[0]].rank_after
    (note,) = run.notes
    assert told in note


def test_lines_cut_short_are_left_out_and_told(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", events=EVENTS, run=run_values(final_ranks={}))
    for name in ("metrics.jsonl", "ranks.jsonl"):
        text = (root / name).read_text()
        (root / name).write_text(text[:-9])
    run = read_run(root)
    assert [event.step for event in run.events] == [10]
    assert len(run.metrics) == 5
    assert [note.split(" was cut")[0] for note in run.notes] == [
        "The last line of metrics.jsonl", "The last line of ranks.jsonl",
    ]  # fmt: skip
    (root / "metrics.jsonl").unlink()
    assert "holds no line" in read_run(root).notes[-1]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("status", "done", "`status` .* one of finished, running, .* 'done'"),
        ("metrics_after", {"loss": "low"}, "`metrics_after.loss` .* valid number, got 'low'"),
        (
            "metrics_after",
            {"loss": float("nan")},
            "`metrics_after.loss` .* finite number, got 'nan'",
        ),
        ("seconds", {"evaluation": True}, "`seconds.evaluation` .* valid number, got 'True'"),
        ("parameters", [1, 2], "`parameters` .* an object"),
        ("steps", "many", "`steps` .* valid integer, got 'many'"),
        ("budget", True, "`budget` .* valid integer, got 'True'"),
        ("budget", 10**400, r"run\.json must be one whole JSON object.*number beyond"),
        ("final_ranks", {"a": 1.5}, "`final_ranks.a` .* valid integer"),
        ("final_ranks", {"a": -1}, "`final_ranks` .* at least 0"),
        ("final_ranks", {"a": 4}, "`final_ranks` .* of the layers in ranks.jsonl"),
        ("class_names", ["a", 7], "`class_names.1` .* valid string, got '7'"),
        ("format", 7, "written by dynlora 9.8, format 7; this version reads up to 1: upgrade"),
        ("format", "new", "`format` .* whole number from 1 to 1, but got 'new'"),
    ],
)
def test_a_value_of_another_kind_is_named(
    tmp_path: Path, key: str, value: object, told: str
) -> None:
    values = run_values(dynlora="9.8", **{key: value})
    with pytest.raises(RunFileError, match=told):
        read_run(write_run(tmp_path / "run", events=EVENTS, run=values))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("run.json", "", r"run\.json must be one whole .* 0 char"),
        ("run.json", '{"status": "fin', r"run\.json must be one whole .* 15 char"),
        ("run.json", "[1, 2]", r"run\.json must be one whole .* but list"),
        ("config.yaml", "a: [1,", r"config\.yaml must be the YAML .* 6 characters"),
        ("metrics.jsonl", '{"step": 1}\n{"step": "two"}\n', "step 'two' in line 2"),
        ("metrics.jsonl", '{"step": 1}\n\n', "must be a JSON object .* in line 2"),
        ("metrics.jsonl", '{"step": ' + "[" * 100_000 + "\n", r"must be .*64 levels\) in line 1"),
    ],
    ids=lambda value: value[:20],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str, told: str) -> None:
    root = write_run(tmp_path / "run")
    (root / name).write_text(content)
    with pytest.raises(RunFileError, match=told):
        read_run(root)


def layer(**changes: object) -> dict[str, object]:
    event = EVENTS[1].to_dict()
    event["layers"][NAMES[0]] |= changes
    return event


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[]", "not an object but list"),
        ("{}", "`event.step` .* required"),
        (json.dumps(layer(rank_after=True)), "rank_after` .* valid integer, got 'True'"),
        (json.dumps(layer(rank_after=-1)), "ranks must be at least 0"),
        (json.dumps(layer(more=1)), r"\.more` .* [Uu]nexpected"),
        (json.dumps(layer(score={})), r"\.score`"),
        (json.dumps(layer(score=float("nan"))), "finite number"),
        (json.dumps(layer(waits=1)), r"\.waits` .* boolean"),
        (json.dumps(layer() | {"agreement": "much"}), "`event.agreement`"),
        (json.dumps(layer() | {"step": 9}), "`step` in order"),
        (json.dumps(make_events(["other"], [20])[0].to_dict()), "those of the line before"),
    ],
)
def test_a_broken_event_is_named_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    root = write_run(tmp_path / "run", events=EVENTS)
    first = (root / "ranks.jsonl").read_text().splitlines()[0]
    (root / "ranks.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(RunFileError, match=f"(?s){told}.* in line 2"):
        read_run(root)


def test_events_written_before_directions_were_counted_are_read(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", events=EVENTS)
    event = EVENTS[0].to_dict()
    for figures in event["layers"].values():
        del figures["directions"]
    (root / "ranks.jsonl").write_text(json.dumps(event) + "\n")
    assert list(read_run(root).events) == EVENTS[:1]
