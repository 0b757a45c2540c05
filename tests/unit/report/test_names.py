"""Short names of layers."""

import pytest

from dynlora.report.names import short_names


def test_what_all_names_share_is_left_out() -> None:
    names = [
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.11.output.dense",
        "bert.pooler.dense",
    ]
    assert list(short_names(names).values()) == [
        "0.attention.self.query", "11.output.dense", "pooler.dense",
    ]  # fmt: skip


def test_the_order_of_the_names_is_kept() -> None:
    names = ["m.layers.1.q", "m.layers.0.q"]
    assert list(short_names(names)) == names


def test_two_stacks_of_blocks_stay_apart() -> None:
    names = ["t5.encoder.block.0.q", "t5.decoder.block.0.q"]
    assert list(short_names(names).values()) == ["encoder.block.0.q", "decoder.block.0.q"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["query"], ["query"]),
        (["model.query"], ["query"]),
        (["a.0", "a.1"], ["0", "1"]),
        (["x.q", "x.k"], ["q", "k"]),
        ([], []),
    ],
)
def test_short_lists_work_too(names: list[str], short: list[str]) -> None:
    assert list(short_names(names).values()) == short


def test_short_names_are_unique_for_a_large_model() -> None:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    names = [f"model.layers.{n}.{part}" for n in range(80) for part in parts]
    short = short_names(names)
    assert len(set(short.values())) == len(names)
    assert short["model.layers.7.mlp.up_proj"] == "7.mlp.up_proj"
