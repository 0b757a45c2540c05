"""Invariants 8 and 9: outputs depend on no batch, and runs of one seed are the same."""

from contextlib import nullcontext

import pytest
import torch

from dynlora.adapters.hooks import ActivationTaps
from dynlora.adapters.layers import find_lora_layers
from dynlora.config import METRICS
from tests.models import adamw, attached, lora_llama, train, trained


class Recorder:
    """Keeps, per layer, the inputs by sampling key."""

    def __init__(self):
        self.seen = {}

    def observe(self, name, keys, read):
        inputs, _ = read(torch.arange(len(keys)))
        for key, row in zip(keys.tolist(), inputs, strict=True):
            self.seen.setdefault(name, {})[key] = row.detach()


def recorded(batches):
    model = lora_llama()
    recorder = Recorder()
    taps = ActivationTaps(model, find_lora_layers(model, None), recorder, timed=nullcontext)
    taps.open()
    for tokens, mask in batches:
        model(input_ids=tokens, attention_mask=mask)
    taps.close()
    unused = torch.iinfo(torch.int64).max
    return {
        name: {key: row for key, row in rows.items() if key != unused}
        for name, rows in recorder.seen.items()
    }


def padded(examples, length, side):
    tokens = torch.zeros(len(examples), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, example in enumerate(examples):
        part = slice(0, len(example)) if side == "right" else slice(length - len(example), length)
        tokens[row, part] = torch.tensor(example)
        mask[row, part] = 1
    return tokens, mask


EXAMPLES = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


def test_tokens_get_the_same_keys_and_inputs_alone_in_a_batch_and_under_any_padding():
    alone = recorded([padded([example], len(example), "right") for example in EXAMPLES])
    for length, side, order in ((7, "right", 1), (11, "right", -1), (9, "left", 1)):
        together = recorded([padded(EXAMPLES[::order], length, side)])
        assert together.keys() == alone.keys()
        for name, rows in alone.items():
            assert rows.keys() == together[name].keys()
            assert len(rows) == sum(len(example) for example in EXAMPLES)
            for key, row in rows.items():
                torch.testing.assert_close(together[name][key], row, atol=1e-5, rtol=1e-4)


def test_an_examples_output_does_not_depend_on_its_batch_after_ranks_moved(tiny_llama):
    optimizer = adamw(tiny_llama)
    train(tiny_llama, optimizer, attached(tiny_llama, optimizer, total_steps=30), 30)
    tokens, mask = padded(EXAMPLES, 12, "right")
    with torch.no_grad():
        together = tiny_llama(input_ids=tokens, attention_mask=mask).logits
        for row, example in enumerate(EXAMPLES):
            alone = tiny_llama(input_ids=torch.tensor([example])).logits[0]
            torch.testing.assert_close(together[row, : len(example)], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("importance", METRICS)
def test_same_seed_twice_is_bitwise_equal_whatever_is_logged(importance, caplog):
    runs = []
    for level in ("DEBUG", "CRITICAL"):
        caplog.set_level(level, logger="dynlora")
        model = lora_llama()
        _, dynamic = trained(model, 30, importance=importance, total_steps=30, hysteresis=0)
        runs.append((dynamic.history, [p.detach() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    layers = [layer for event in runs[0][0] for layer in event.layers.values()]
    moved = any(layer.rank_before != layer.rank_after for layer in layers)
    assert moved == (importance != "uniform")
    assert all(torch.equal(one, other) for one, other in zip(runs[0][1], runs[1][1], strict=True))


def test_the_random_metric_follows_its_seed():
    ranks = []
    for seed in (0, 1):
        model = lora_llama()
        _, dynamic = trained(model, 30, importance="random", total_steps=30, seed=seed)
        ranks.append(dynamic.ranks)
    assert ranks[0] != ranks[1]
