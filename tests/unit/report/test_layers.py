"""Layers by their names: blocks of a stack, layers outside blocks, and short names."""

import pytest

from dynlora.layer_names import short_names
from dynlora.report.layers import Stack, arrange
from tests.unit.report.runs import KINDS, block_names


def test_blocks_form_a_grid_and_layers_outside_blocks_are_listed() -> None:
    first, stack, last = arrange(["embed", *block_names(3), "classifier", "heads.0"])
    assert first == ("embed",)
    assert isinstance(stack, Stack)
    assert (stack.prefix, list(stack.blocks), stack.kinds) == (
        "bert.encoder.layer", ["0", "1", "2"], KINDS,
    )  # fmt: skip
    assert last == ("bert.pooler.dense", "classifier", "heads.0")
    names = [f"{side}.block.{n}.layer.1.q" for side in ("encoder", "decoder") for n in range(2)]
    parts = arrange([*names, "0.q"])
    assert [(part.prefix, part.kinds) for part in parts if isinstance(part, Stack)] == [
        ("encoder.block", ("layer.1.q",)), ("decoder.block", ("layer.1.q",)), ("", ("q",)),
    ]  # fmt: skip


def test_stacks_of_many_or_unlike_kinds_are_listed() -> None:
    experts = tuple(f"layers.{n}.experts.{e}.up" for n in range(2) for e in range(64))
    assert arrange(experts) == [experts]
    unlike = tuple(f"layers.{n}.kind{n}" for n in range(4))
    assert arrange(unlike) == [unlike]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["b.layer.1.q", "b.layer.0.q", "b.pooler"], ["1.q", "0.q", "pooler"]),
        (["t5.a.block.0.q", "t5.b.block.0.q"], ["a.block.0.q", "b.block.0.q"]),
        (["model.query"], ["query"]),
        (["a.0", "a.1"], ["0", "1"]),
        ([], []),
    ],
)  # fmt: skip
def test_short_names_are_unique_and_in_order(names: list[str], short: list[str]) -> None:
    assert short_names(names) == dict(zip(names, short, strict=True))
