"""The screen's cached trunk changes no output, and its searches run what each criterion needs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from benchmarks.last_blocks.arms import ALLOCATIONS
from benchmarks.last_blocks.frozen_trunk import (
    IGNORED,
    IMAGE_POSITIONS,
    SIDE,
    CachedExamples,
    Decoder,
    Examples,
    VisionTransformer,
    logits_of,
    write_states,
)
from benchmarks.last_blocks.runs import COLUMNS, Runner
from benchmarks.last_blocks.screen import count_missing, finish
from benchmarks.last_blocks.screen_report import entering, meets
from benchmarks.last_blocks.tasks import read_screen
from benchmarks.resumable.appended import AppendedTable
from benchmarks.resumable.time_limit import TimeLimit
from tests.models import bare_llama

STUDY = Path(__file__).parents[2] / "benchmarks" / "studies" / "screen.toml"
BEST = {"uniform": 0.016, "wide": 0.008, "lower": 0.008, "ceiling": 0.016, "auto": 0.016}
"""Learning rates with the lowest loss; 0.016 for other arms."""


@pytest.fixture
def decoder(tmp_path):
    """Return a decoder in two parts, texts with labels at some tokens, and their true logits."""
    whole = bare_llama(layers=4)
    whole.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(0, 16, (length,), generator=generator).tolist() for length in (3, 5, 5, 9)
    ]
    labels = [[IGNORED] * (len(ids) - 2) + [0, 1] for ids in texts]
    with torch.no_grad():
        logits = torch.cat([whole(torch.tensor([ids])).logits[0, -2:] for ids in texts])
    return Decoder(tmp_path, blocks=2), Examples(texts, labels), logits


@pytest.fixture
def vision(tmp_path):
    """Return a vision transformer in two parts, images, and the true states of the class token."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        initializer_range=0.3,
    )
    whole = Dinov2Model(config).eval()
    whole.save_pretrained(tmp_path)
    size = {"height": SIDE, "width": SIDE}
    processor = BitImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    processor.save_pretrained(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    colours = [np.stack([image] * 3, axis=-1) for image in images]
    with torch.no_grad():
        states = whole(**processor(colours, return_tensors="pt")).last_hidden_state[:, 0]
    labels = [[1] + [IGNORED] * (IMAGE_POSITIONS - 1)] * len(images)
    return VisionTransformer(tmp_path, blocks=1), Examples(images, labels), states


@pytest.mark.parametrize("kind", ["decoder", "vision"])
def test_cached_trunk_and_upper_blocks_equal_the_whole_model(kind, request, tmp_path):
    model, examples, expected = request.getfixturevalue(kind)
    path = tmp_path / "cache" / "part"
    write_states(model, examples, path, TimeLimit(1))
    head = model.head(list(range(16))) if kind == "decoder" else torch.eye(16)
    data = CachedExamples(examples, path, 16 * (1 + (kind == "decoder")))
    inputs, labels = data.batch(range(len(examples.labels)))
    with torch.no_grad():
        found = logits_of(model.student(), inputs, labels != IGNORED, head)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Return a runner whose runs take no time and whose best learning rates are known."""

    def run(self, kind, task, arm, seed, learning_rate):
        loss = 1 + abs(np.log2(learning_rate / BEST.get(arm, 0.016))) - 0.5 * (arm == "lower")
        row = {"kind": kind, "task": task, "arm": arm, "seed": seed}
        self.table.append(row | {"learning_rate": learning_rate, "loss": loss})

    monkeypatch.setattr(Runner, "run", run)
    table = AppendedTable(tmp_path / "screen.csv", COLUMNS)
    return Runner(read_screen(STUDY), table, tmp_path, tmp_path, tmp_path, None, TimeLimit(1))


def test_only_the_best_allocation_gets_final_runs_and_no_chosen_rate_is_at_an_edge(runner):
    seeds = [0, 1, 2]
    for criterion in ("a", "b", "c"):
        assert count_missing(runner, [("german", criterion)], seeds) > 0
        finish(runner, "german", criterion, seeds)
        assert count_missing(runner, [("german", criterion)], seeds) == 0
    finals = runner.table.select(kind="final")
    assert {row["arm"]: row["learning_rate"] for row in finals} == BEST
    assert len(finals) == 15
    for arm, rate in BEST.items() - {("auto", 0.016)}:
        tried = {row["learning_rate"] for row in runner.table.select(kind="trial", arm=arm)}
        assert {rate / 2, rate, 2 * rate} <= tried
    for arm in ALLOCATIONS:
        assert len(runner.table.select(kind="trial", arm=arm)) == 2 + (arm == "lower")


def test_tasks_that_meet_both_criteria_and_the_three_cheapest_where_rank_binds_are_compared():
    gains = {"both": (0.03, 0.02), "uneven": (0.01, 0.02), "first": (0.03, 0.0)}
    gains |= dict.fromkeys(("second", "third", "dear"), (0.03, 0.0))
    rows = []
    for place, (task, (wide, lower)) in enumerate(gains.items()):
        rows += [
            {"kind": "trial", "task": task, "arm": arm, "seed": 150, "loss": 1.0 - (arm == "lower")}
            for arm in ALLOCATIONS
        ]
        rows += [
            {"kind": "final", "task": task, "arm": arm, "seed": 0, "loss": loss, "seconds": seconds}
            for arm, loss in (("uniform", 1.0), ("wide", 1 - wide), ("lower", 1 - lower))
            for seconds in [90 - 10 * place + 50 * (task == "dear")]
        ]
    assert [meets(rows, task) for task in gains] == ["a, b", "none", *"aaaa"]
    assert entering(rows) == ["both", "third", "second", "first"]
    assert meets(rows[:-1], "dear") is None
