"""The plan of a model from its module names."""

from dynlora.report.blocks import Loose, Stack, arrange, block_of
from tests.unit.report.runs import KINDS, block_names


def test_a_name_is_cut_at_its_first_number() -> None:
    assert block_of("bert.encoder.layer.0.attention.query") == (
        "bert.encoder.layer", "0", "attention.query",
    )  # fmt: skip
    assert block_of("enc.block.3.layer.1.wi") == ("enc.block", "3", "layer.1.wi")
    assert block_of("0.q") == ("", "0", "q")
    assert block_of("pooler.dense") is None
    assert block_of("heads.0") is None, "nothing stands behind the number"


def test_blocks_make_a_grid_and_ends_stand_alone() -> None:
    names = ["embed", *block_names(3), "classifier"]
    first, stack, last = arrange(names)
    assert first == Loose(("embed",))
    assert isinstance(stack, Stack)
    assert (stack.prefix, list(stack.blocks), stack.kinds) == (
        "bert.encoder.layer", ["0", "1", "2"], KINDS,
    )  # fmt: skip
    assert last == Loose(("bert.pooler.dense", "classifier"))


def test_two_stacks_stay_apart() -> None:
    names = [f"{side}.block.{n}.q" for side in ("encoder", "decoder") for n in range(2)]
    parts = arrange(names)
    assert [part.prefix for part in parts if isinstance(part, Stack)] == [
        "encoder.block", "decoder.block",
    ]  # fmt: skip


def test_blocks_of_many_kinds_or_of_unlike_ones_are_listed() -> None:
    experts = tuple(f"layers.{n}.experts.{e}.up" for n in range(2) for e in range(64))
    assert arrange(experts) == [Loose(experts)]
    unlike = tuple(f"layers.{n}.kind{n}" for n in range(4))
    assert arrange(unlike) == [Loose(unlike)]


def test_no_layer_is_lost() -> None:
    names = ["a", *block_names(4), "b.0", *[f"x.{n}.y{n}" for n in range(5)]]
    assert sorted(name for part in arrange(names) for name in part.names) == sorted(names)
