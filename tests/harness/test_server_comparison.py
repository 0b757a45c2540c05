"""The comparison of a server's continuations with PEFT's."""

import pytest

from benchmarks.engines.compare import NEAR_TIE, compare, first_difference


def peft(gap=1.0):
    return {
        "tokens": [5, 6, 2],
        "logprobs": [-0.1, -0.2, -0.3],
        "runner_up": [7, 8, 9],
        "gaps": [1.0, gap, 1.0],
    }


def engine(tokens=(5, 6, 2), logprobs=(-0.1, -0.2, -0.3)):
    return {"tokens": list(tokens), "logprobs": list(logprobs)}


def test_equal_tokens_pass_and_report_the_largest_difference_of_log_probabilities():
    verdict = compare([peft(), peft()], [engine(), engine(logprobs=(-0.1, -0.25, -0.3))])
    assert (verdict["passed"], verdict["equal"], verdict["prompts"]) == (True, 2, 2)
    assert verdict["logprob_difference"] == pytest.approx(0.05)
    # After a difference they do not count.
    verdict = compare([peft(gap=0.0)], [engine((5, 8, 3), (-0.1, -9.0, -9.0))])
    assert verdict["logprob_difference"] == 0
    with pytest.raises(ValueError, match="got 2 and 1"):
        compare([peft(), peft()], [engine()])


@pytest.mark.parametrize(("differing", "passed"), [(1, True), (2, False)])
def test_nineteen_of_twenty_are_enough_and_eighteen_are_not(differing, passed):
    near_ties = [(peft(gap=NEAR_TIE / 2), engine((5, 8, 2)))] * differing
    verdict = compare(*zip(*[(peft(), engine())] * (20 - differing), *near_ties, strict=True))
    assert (verdict["equal"], verdict["passed"]) == (20 - differing, passed)


@pytest.mark.parametrize(
    ("gap", "token"), [(NEAR_TIE * 2, 8), (NEAR_TIE / 2, 9)], ids=["no tie", "not the runner-up"]
)
def test_a_difference_that_rounding_does_not_explain_fails(gap, token):
    pairs = [(peft(), engine())] * 19 + [(peft(gap=gap), engine((5, token, 2)))]
    verdict = compare(*zip(*pairs, strict=True))
    assert (verdict["equal"], verdict["passed"]) == (19, False)
    assert verdict["differences"] == [
        {"prompt": 19, "place": 1, "peft": 6, "engine": token, "gap": gap, "near_tie": False}
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "place"), [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1)]
)
def test_the_first_difference_is_where_tokens_part(ours, theirs, place):
    assert first_difference(ours, theirs) == place
