"""The order of layers by their names."""

from dynlora.adapter_files.names import natural_key


def test_blocks_are_in_the_order_of_their_numbers() -> None:
    names = ["m.0.q", "m.2.q", "m.10.k", "m.10.q", "m.head", "x"]
    assert sorted(sorted(names), key=natural_key) == names


def test_any_text_has_its_place() -> None:
    # Digits that are no numbers, and numbers that Python does not make.
    names = ["", "m.", "m.²", "m.٣", f"m.{'9' * 5000}", f"m.{'9' * 5001}", "m.007", "m.7"]
    ordered = sorted(names, key=natural_key)
    assert ordered.index(f"m.{'9' * 5000}") < ordered.index(f"m.{'9' * 5001}")
