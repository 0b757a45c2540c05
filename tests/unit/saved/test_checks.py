"""What a saved adapter must be."""

import pytest
from peft.utils.other import get_pattern_key

from dynlora.saved.checks import match_pattern

NAMES = [
    f"{prefix}layers.{number}.{leaf}"
    for prefix in ("", "model.", "model.language_model.")
    for number in (0, 1, 10)
    for leaf in ("self_attn.q_proj", "mlp.q_proj", "q_proj", "xq_proj", "q_projx")
]


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1},
        {"layers.1.q_proj": 1, "q_proj": 2},
        {r"layers\.1\.self_attn\.q_proj": 1},
        {r"^model\.layers\.0\.q_proj": 1, ".*": 2},
        {"layers": 1, r"layers\.(0|1)\..*": 2},
        {"a|q_proj": 1},
        {"": 1},
        {},
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(patterns):
    for name in NAMES:
        expected = patterns.get(get_pattern_key(patterns.keys(), name), 0)
        assert match_pattern(patterns, name, 0) == expected, name
