"""A run's folder as one value, and what is said of folders that are none."""

import json
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
    assert [event.step for event in run.events] == [10, 20]
    assert run.initial_ranks == dict.fromkeys(NAMES, 8)
    assert run.final_ranks == {n: layer.rank_after for n, layer in EVENTS[-1].layers.items()}
    assert run.notes == []


def test_ranks_of_a_run_without_event_are_those_it_ended_with(tmp_path: Path) -> None:
    values = run_values(final_ranks={"a": 4, "b": 6})
    run = read_run(write_run(tmp_path / "run", run=values))
    assert run.initial_ranks == run.final_ranks == {"a": 4, "b": 6}


def test_ranks_of_plain_lora_come_from_its_adapter_in_the_order_of_blocks(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", run=run_values(method="lora", final_ranks={}))
    tensors = {}
    for block, rank in ((2, 5), (10, 7), (0, 3)):
        name = f"base_model.model.m.layers.{block}.q"
        tensors[f"{name}.lora_A.weight"] = np.zeros((rank, 16), np.float32)
        tensors[f"{name}.lora_B.weight"] = np.zeros((16, rank), np.float32)
    tensors["base_model.model.embed.lora_embedding_A"] = np.zeros((2, 30), np.float32)
    tensors["base_model.model.conv.lora_A.weight"] = np.zeros((6, 3, 2, 2), np.float32)
    tensors["base_model.model.classifier.weight"] = np.zeros((2, 16), np.float32)
    (root / "adapter").mkdir()
    save_file(tensors, root / "adapter" / "adapter_model.safetensors")
    run = read_run(root)
    assert run.initial_ranks == {}
    assert list(run.final_ranks.items()) == [
        ("conv", 6), ("embed", 2),
        ("m.layers.0.q", 3), ("m.layers.2.q", 5), ("m.layers.10.q", 7),
    ]  # fmt: skip


def test_an_adapter_cut_short_is_named_with_its_size(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", run=run_values(method="lora"))
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(RunFileError, match=r"adapter_model\.safetensors of 3 bytes"):
        read_run(root)


def test_an_adapter_with_an_endless_name_is_refused(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", run=run_values(method="lora"))
    (root / "adapter").mkdir()
    tensors = {f"{'x' * 1_000_000}.lora_A.weight": np.zeros((2, 3), np.float32)}
    save_file(tensors, root / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"at most 2000 characters.* 1000014"):
        read_run(root)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ("running", "is still running, or was killed"),
        ("interrupted", "was stopped by its user"),
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
    assert run.after == {}
    assert run.final_ranks[NAMES[0]] == EVENTS[-1].layers[NAMES[0]].rank_after
    assert len(run.notes) == 1
    assert told in run.notes[0]


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


@pytest.mark.parametrize("remove", [True, False])
def test_a_run_that_logged_nothing_says_so(tmp_path: Path, remove: bool) -> None:
    root = write_run(tmp_path / "run", metrics=[])
    if remove:
        (root / "metrics.jsonl").unlink()
    assert "holds no line" in read_run(root).notes[0]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match=r"nowhere, which is no folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunFileError, match="a folder without one"):
        read_run(tmp_path)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(RunFileError, match="no folder"):
        read_run(tmp_path / "file")


@pytest.mark.parametrize("text", ["", '{"status": "fin', "[1, 2]", "nothing"])
def test_a_run_json_cut_short_is_named_with_its_length(tmp_path: Path, text: str) -> None:
    root = write_run(tmp_path / "run")
    (root / "run.json").write_text(text)
    with pytest.raises(RunFileError, match=rf"run\.json must be one whole .* {len(text)} char"):
        read_run(root)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("status", "done", "`status` .* one of finished, running, .* 'done'"),
        ("status", {"x": 1}, "`status` .* one of finished"),
        ("metrics_after", {"loss": "low"}, "`loss` of `metrics_after` .* a number, got 'low'"),
        ("metrics_after", {"loss": float("nan")}, "`metrics_after` .* finite numbers, got .*nan"),
        ("seconds", {"training_steps": float("inf")}, "`seconds` .* finite numbers, got .*inf"),
        ("parameters", [1, 2], "`parameters` .* an object"),
        ("steps", "many", "`steps` .* whole number, got 'many'"),
        ("budget", True, "`budget` .* whole number, got 'True'"),
        ("budget", 10**400, r"run\.json must be one whole JSON object.*number beyond"),
        ("peak_memory_bytes", 1.5, "`peak_memory_bytes` .* whole number, got '1.5'"),
        ("final_ranks", {"a": 1.5}, "`a` of `final_ranks` .* whole number"),
        ("final_ranks", {"a": -1}, "`final_ranks` .* at least 0"),
        ("final_ranks", {"a": 4}, "`final_ranks` .* of the layers in ranks.jsonl"),
        ("class_names", ["a", 7], "`class_names` .* a text, got '7'"),
        ("format", 7, "written by dynlora 9.8, format 7; this version reads up to 1: upgrade"),
        ("format", "new", "`format` .* whole number from 1 to 1, but got 'new'"),
        ("format", 0, "`format` .* whole number from 1 to 1, but got '0'"),
    ],
)
def test_a_value_of_another_kind_is_named(
    tmp_path: Path, key: str, value: object, told: str
) -> None:
    root = write_run(tmp_path / "run", events=EVENTS)
    values = run_values(dynlora="9.8", **{key: value})
    (root / "run.json").write_text(json.dumps(values))
    with pytest.raises(RunFileError, match=told):
        read_run(root)


@pytest.mark.parametrize("stamp", [{}, {"format": 1, "dynlora": "0.1.0"}])
def test_this_format_is_read_with_and_without_its_number(
    tmp_path: Path, stamp: dict[str, object]
) -> None:
    assert read_run(write_run(tmp_path / "run", run=run_values(**stamp))).steps == 100


def test_a_missing_or_broken_configuration_is_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run")
    (root / "config.yaml").write_text("a: [1,")
    with pytest.raises(RunFileError, match=r"config\.yaml must be the YAML .* 6 characters"):
        read_run(root)
    (root / "config.yaml").unlink()
    with pytest.raises(RunFileError, match=r"readable config\.yaml"):
        read_run(root)


def layer(**changes: object) -> dict[str, object]:
    event = EVENTS[1].to_dict()
    event["layers"][NAMES[0]] |= changes
    return event


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not json", "'{not json'"),
        ("[]", "not an object but list"),
        ("{}", "must hold `step`"),
        (json.dumps(layer(rank_after="8")), "`rank_after` .* whole number, got '8'"),
        (json.dumps(layer(rank_after=True)), "`rank_after` .* whole number, got 'True'"),
        (json.dumps(layer(rank_after=-1)), "ranks must be at least 0"),
        (json.dumps(layer(more=1)), "got `more`"),
        (json.dumps(layer(score={})), "`score`"),
        (json.dumps(layer(score=float("nan"))), "must be finite"),
        (json.dumps(layer(share="x")), "`share`"),
        (json.dumps(layer(waits=1)), "`waits` .* true or false"),
        (json.dumps(layer(variance=[1])), "`variance`"),
        (json.dumps(layer(directions="x")), "`directions`"),
        (json.dumps(layer() | {"agreement": "much"}), "`agreement`"),
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


def test_a_logged_line_without_its_step_is_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", metrics=[{"step": 1}, {"step": "two"}])
    with pytest.raises(RunFileError, match="step 'two' in line 2"):
        read_run(root)


def test_lines_that_nest_without_end_are_refused(tmp_path: Path) -> None:
    root = write_run(tmp_path / "run", events=EVENTS)
    (root / "metrics.jsonl").write_text('{"step": ' + "[" * 100_000 + "\n")
    with pytest.raises(RunFileError, match=r"metrics\.jsonl must be .*64 levels\) in line 1"):
        read_run(root)
