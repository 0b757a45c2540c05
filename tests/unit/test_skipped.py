"""Counts of what was left out, whatever the layers of a step."""

from collections import Counter

import torch

from dynlora.skipped import SkippedObservations


def test_layers_are_counted_by_name_in_steps_of_the_same_and_of_other_layers():
    skipped = SkippedObservations({"b": 5})
    skipped.add_unless(torch.tensor([True, False, False]), ["a", "b", "c"])
    skipped.add_unless(torch.tensor([True, True, False]), ["a", "b", "c"])
    skipped.add_unless(torch.tensor([False]), ["c"])
    skipped.add(["d"])
    assert skipped.counts() == Counter({"b": 6, "c": 3, "d": 1})
    skipped.add_unless(torch.tensor([False]), ["c"])
    assert skipped.counts() == skipped.counts() == Counter({"b": 6, "c": 4, "d": 1})


def test_a_layer_that_was_never_left_out_is_not_named():
    skipped = SkippedObservations()
    skipped.add_unless(torch.tensor([True, True]), ["a", "b"])
    assert skipped.counts() == Counter()
    assert list(skipped.counts()) == []


def test_what_was_counted_is_not_changed_by_whoever_reads_it():
    skipped = SkippedObservations({"a": 1})
    skipped.counts().update(["a"])
    assert skipped.counts() == Counter({"a": 1})
