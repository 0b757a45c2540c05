"""Inputs against ranks: figures equal an independent sum, and a planted relation is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.last_blocks.arms import DYNAMIC, UNIFORM, WIDE, wide_at
from benchmarks.last_blocks.inputs import (
    Inputs,
    correlations,
    describe_examples,
    layer_figures,
    report,
)
from benchmarks.last_blocks.runs import COLUMNS, Runner
from benchmarks.last_blocks.tasks import TaskConfig, read_screen
from benchmarks.last_blocks.training import Run
from benchmarks.resumable.appended import AppendedTable
from benchmarks.resumable.time_limit import TimeLimit
from tests.models import bare_llama

SCREEN = Path(__file__).parents[2] / "benchmarks" / "studies" / "screen.toml"
TASK = "books"


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Return a runner of a small model on one task of 24 facts."""
    rows = [{"prompt": "abcdefg"[: i % 5 + 2], "completion": "yn"[i % 2]} for i in range(48)]
    (tmp_path / TASK).mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / TASK / "train.parquet")
    folder = tmp_path / "model"
    bare_llama(layers=3).save_pretrained(folder)

    class Tokens:
        def __call__(self, text, **_):
            self.input_ids = [ord(letter) % 16 for letter in text]
            return self

    monkeypatch.setattr(
        "benchmarks.last_blocks.runs.AutoTokenizer.from_pretrained", lambda folder: Tokens()
    )
    task = TaskConfig(kind="facts", folder=TASK, batch=8, rows=24)
    screen = replace(read_screen(SCREEN), tasks={TASK: task})
    table = AppendedTable(tmp_path / "record.csv", (*COLUMNS, "losses"))
    runner = Runner(screen, table, tmp_path, tmp_path, folder, None, TimeLimit(1))
    runner.describe = describe_examples
    return runner


def test_the_losses_of_examples_have_the_mean_of_the_run_and_layers_have_correlations(
    runner,
):
    names = layer_names(runner)
    for seed in (0, 1):
        for arm in (UNIFORM, WIDE, DYNAMIC, *map(wide_at, names)):
            runner.run("final", TASK, arm, seed, 0.01)
    for row in runner.table.rows:
        assert len(row["losses"]) == 24
        assert np.mean(row["losses"]) == pytest.approx(row["loss"], abs=1e-4)
    one = runner.table.find(arm=wide_at(names[0]))
    assert one["ranks"] == dict.fromkeys(names, 2) | {names[0]: 8}
    study = Inputs(screen="", tasks=[TASK], seeds=[0, 1], batches=3)
    lines = report(study, runner, TASK)
    assert [line.split(" | ")[1:3] for line in lines] == [
        *(
            ["layers", name]
            for name in (
                "variance",
                "effective rank",
                "output power",
                "gain with another seed",
            )
        ),
        *(
            ["examples", name]
            for name in ("length", "variance", "effective rank", "gain with another seed")
        ),
    ]


def layer_names(runner):
    student = runner.load(TASK).model.student()
    return [name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)]


def test_the_variance_of_a_layers_inputs_is_that_of_its_tokens_without_padding(runner):
    run = Run(task=runner.load(TASK), kind="final", learning_rate=0, scale=1, seed=0)
    first = layer_names(runner)[0]
    place = layer_names(runner).index(first)
    found = layer_figures(run, batches=3)["variance"][place]
    norm = run.task.model.student().layers[0].input_layernorm
    batches = [run.data.batch([row])[0]["inputs_embeds"][0] for row in range(24)]
    tokens = norm(torch.cat(batches)).double()
    assert found == pytest.approx(tokens.var(dim=0, correction=0).mean().item(), rel=1e-4)


def test_a_predictor_of_the_gains_has_correlation_one_and_a_random_one_does_not():
    draw = np.random.default_rng(0)
    gains = draw.normal(size=(1, 60)) + draw.normal(size=(3, 60)) / 10
    found = correlations(gains, {"same": np.exp(gains.mean(axis=0)), "other": draw.normal(size=60)})
    assert found.keys() == {"same", "other", "gain with another seed"}
    assert found["same"] == pytest.approx((1, 1, 1))
    assert found["other"][1] < 0 < found["other"][2]
    assert found["gain with another seed"][0] > 0.9
