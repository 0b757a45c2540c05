"""Counts of what was left out, whatever the layers of a step."""

from collections import Counter

import torch

from dynlora.skipped import SkippedObservations

YES, NO = torch.tensor(True), torch.tensor(False)


def test_layers_are_counted_by_name_in_steps_of_all_and_of_some_layers():
    skipped = SkippedObservations(["a", "b", "c", "d"], {"b": 5})
    skipped.add_broken({"a": YES, "b": NO, "c": NO})
    skipped.add_broken({"c": NO, "a": YES})
    skipped.add(["d"])
    assert skipped.counts() == Counter({"b": 6, "c": 2, "d": 1})
    skipped.add_broken({"c": NO})
    assert skipped.counts() == skipped.counts() == Counter({"b": 6, "c": 3, "d": 1})


def test_a_layer_that_was_never_left_out_is_not_named():
    skipped = SkippedObservations(["a", "b"])
    skipped.add_broken({"a": YES, "b": YES})
    assert list(skipped.counts()) == []


def test_what_was_counted_is_not_changed_by_whoever_reads_it():
    skipped = SkippedObservations(["a"], {"a": 1})
    skipped.counts().update(["a"])
    assert skipped.counts() == Counter({"a": 1})
