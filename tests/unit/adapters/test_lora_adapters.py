"""The adapters as a whole: budget, plans, layer weights, and what a checkpoint remembers."""

import copy
import itertools
import sys
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForSequenceClassification

from dynlora.adapters import factor, lora_adapters
from dynlora.adapters import strengths as strengths_module
from dynlora.adapters.lora_adapters import LoraAdapters
from dynlora.errors import LayerError
from dynlora.importance import build_metric
from dynlora.types import RankPlan
from tests.lora_layers import added, layers_of, lora_chain, set_gradients, stats_of
from tests.models import bare_llama

WIDTHS = (8, 10, 6, 12)


def adapters_of(model, follow=lambda change: None):
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return LoraAdapters(model, optimizer, None, follow=follow)


def bare_chain(*widths):
    return nn.Sequential(*(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths)))


def apply(adapters, ranks, features=None, *, seed=0):
    return adapters.apply(RankPlan(step=3, ranks=ranks), features or {}, seed=seed)


def ranks_of(adapters):
    return {name: layer.r for name, layer in adapters.layers.items()}


def test_layers_with_gradients_tell_whether_both_are_finite_and_those_without_are_left_out():
    model = lora_chain(4, 4, 4, 4, 4, 4)
    layers = layers_of(model)
    set_gradients(layers, seed=0)
    layers[1].lora_A.grad[0, 0] = float("nan")
    layers[2].lora_B.grad[1, 1] = float("-inf")
    layers[3].lora_A.grad = None
    found = {layer.name: bool(layer.finite) for layer in adapters_of(model).with_gradients()}
    assert found == {"0": True, "1": False, "2": False, "4": True}
    assert {n: bool(layer.finite) for n, layer in adapters_of(model).layers.items()} == {
        "3": True  # zeros stand for what is not there
    } | found


@pytest.mark.parametrize(
    ("lora", "left_out", "named"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, (), []),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, ("lm_head",), ["lm_head"]),
        ({"target_modules": ["q_proj", "embed_tokens", "wte", "score"]}, (), ["score", "wte"]),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, ("embed",), ["embed_tokens"]),
        ({"trainable_token_indices": [3]}, (), []),
        ({"task_type": "SEQ_CLS"}, (), []),  # PEFT adds "classifier" to "score"
    ],
)
@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_modules_that_the_configuration_names_and_nothing_trains_are_told(
    lora, left_out, named, how, caplog
):
    model = bare_llama()
    if "task_type" in lora:
        model = LlamaForSequenceClassification(model.config)
    model = get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj"]} | lora))
    rest = [p for n, p in model.named_parameters() if any(part in n for part in left_out)]
    trained = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in rest)]
    if how == "frozen":
        trained += rest
        for parameter in rest:
            parameter.requires_grad_(False)
    LoraAdapters(model, AdamW(trained), None, follow=lambda change: None)
    told = [f"`LoraConfig` names {', '.join(named)}, of which nothing is trained"] if named else []
    assert [record.message.partition(":")[0] for record in caplog.records] == told


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_large_gradients_are_finite_though_their_norm_exceeds_half_precision(dtype):
    model = lora_chain(200, 200, dtype=dtype)
    for layer in layers_of(model):
        layer.lora_A.grad, layer.lora_B.grad = (
            torch.full_like(weight, 3e4) for weight in (layer.lora_A, layer.lora_B)
        )
    (layer,) = adapters_of(model).with_gradients()
    assert layer.finite


def test_a_gradient_is_read_once_in_a_step_however_often_it_is_asked_for(monkeypatch):
    model = lora_chain(4, 4, 4)
    set_gradients(layers_of(model), seed=0)
    adapters, read = adapters_of(model), []
    monkeypatch.setattr(factor, "gradient_of", lambda p: read.append(p) or p.grad)
    for layer in adapters.with_gradients():
        for _ in range(3):
            assert layer.finite
            assert torch.equal(layer.grad_A, layer.module.lora_A["default"].weight.grad)
            assert torch.equal(layer.grad_B, layer.module.lora_B["default"].weight.grad)
    assert len(read) == 4
    set_gradients(layers_of(model), seed=1)
    for layer in adapters.with_gradients():
        assert torch.equal(layer.grad_B, layer.module.lora_B["default"].weight.grad)


def test_fewer_tokens_than_components_do_not_show_what_these_add():
    model = lora_chain(*WIDTHS, r=4)
    layer = layers_of(model)[0]
    few = {"0": stats_of(layer, torch.randn(3, 8, dtype=torch.float64))}
    names, tolerance = ["0"], 0.05
    expected = adapters_of(model).lowest_ranks(names, {}, tolerance=tolerance)
    assert adapters_of(model).lowest_ranks(names, few, tolerance=tolerance) == expected
    other = copy.deepcopy(model)
    lost = apply(adapters_of(model), {"0": 3}, few)
    assert lost == apply(adapters_of(other), {"0": 3})
    assert lost["0"] > 0


def test_shrinks_come_before_grows_so_that_the_peak_never_exceeds_the_budget():
    sizes = []
    model = lora_chain(*WIDTHS, r=4)
    adapters = adapters_of(
        model, follow=lambda change: sizes.append(sum(p.numel() for p in lora_weights(model)))
    )
    apply(adapters, {"0": 7, "1": 3, "2": 1})
    assert len(sizes) == 3
    assert max(sizes) <= adapters.budget
    assert adapters.peak_parameters == adapters.budget


def test_the_work_of_an_event_grows_with_the_layers_and_its_decompositions_and_waits_do_not():
    (few, few_calls), (many, many_calls) = (work_of_an_event(layers) for layers in (10, 40))
    assert many_calls <= 4 * few_calls
    assert few["linalg_qr"] == 3
    slow = ("eigh", "svd", "linalg_qr", "pinv", "local_scalar", "nonzero")
    for name in few | many:
        if any(kind in name for kind in slow):
            assert many[name] == few[name], name


def test_layers_that_are_taken_a_few_at_once_or_alone_become_what_they_do_together(monkeypatch):
    """Of equal and other shapes, some never trained in part, and some without inputs."""
    widths, plan = (16, 16, 16, 16, 20, 8, 8), dict(zip("012345", (2, 6, 3, 2, 7, 1), strict=True))

    def event():
        model = lora_chain(*widths, r=4)
        adapters = adapters_of(model)
        layers = list(adapters.layers.values())
        layers[0].lora_B.data[:, 2] = 0
        layers[2].lora_B.data[:, [0, 3]] = 0
        layers[5].lora_B.data.zero_()
        tokens = torch.Generator().manual_seed(1)
        features = {
            layer.name: stats_of(layer, torch.randn(20, layer.in_features, generator=tokens))
            for layer in layers[1:4]
        }
        lowest = adapters.lowest_ranks(list(plan), features, tolerance=0.1)
        lost = apply(adapters, plan, features)
        resized = [weight.detach().clone() for weight in lora_weights(model)]
        adapters.order(features)
        return lowest, lost, resized, lora_weights(model)

    together = event()
    for limit, blocks in ((60_000, [3, 3]), (1, [1] * 6)):
        monkeypatch.setattr(strengths_module, "WORKING_BYTES", limit)
        layers = layers_of(lora_chain(*[16] * 7, r=4))
        assert [len(block) for block in strengths_module.in_blocks(layers)] == blocks
        torch.testing.assert_close(event(), together)


class CountedOperations(TorchDispatchMode):
    """Counts by name the operations that do something: those that return views do not."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        returned = [value.alias_info for value in operation._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            self.asked[operation.overloadpacket.__name__] += 1
        return operation(*args, **kwargs or {})


def work_of_an_event(layers):
    """Count operations of torch, and calls of Python functions, generators once per item."""
    model = lora_chain(*[16] * (layers + 1), r=4)
    adapters = adapters_of(model)
    set_gradients(list(adapters.layers.values()), seed=0)
    adapters._optimizer.step()
    features = {
        name: stats_of(layer, torch.randn(20, 16)) for name, layer in adapters.layers.items()
    }
    plan = {name: 2 if place % 2 else 6 for place, name in enumerate(adapters.layers)}
    calls = Counter()
    with CountedOperations() as counted:
        sys.setprofile(lambda frame, event, _: calls.update([event]))
        try:
            adapters.lowest_ranks(list(plan), features, tolerance=0.1)
            apply(adapters, plan, features)
        finally:
            sys.setprofile(None)
    return counted.asked, calls["call"]


def lora_weights(model):
    return [w for layer in layers_of(model) for w in (layer.lora_A, layer.lora_B)]


def test_resizing_depends_on_seed_and_step_and_not_on_the_global_random_state():
    grown = []
    for seed in (0, 0, 1, 2**64 - 1, 5 - 2**70):
        model = lora_chain(*WIDTHS)
        adapters = adapters_of(model)
        torch.manual_seed(len(grown))
        before = torch.get_rng_state()
        apply(adapters, {"0": 6}, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        grown.append(adapters.layers["0"].lora_A.detach().clone())
    assert torch.equal(grown[0], grown[1])
    assert not any(torch.equal(grown[0], other) for other in grown[2:])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_lowest_rank_loses_no_more_than_tolerated_of_the_layers_output(rank):
    adapters = adapters_of(lora_chain(*WIDTHS))
    layer, unseen = adapters.layers["0"], adapters.layers["1"]
    features = {"0": stats_of(layer, torch.randn(40, 8))}
    inputs = features["0"].tokens.double()
    with torch.no_grad():
        whole = layer.module(inputs).norm()
    seen = torch.linalg.svdvals(inputs @ added(layer).T) / whole
    # A layer whose input was never seen: singular values over the base weight's norm.
    base = unseen.module.get_base_layer().weight.detach().norm()
    singular = torch.linalg.svdvals(added(unseen)) / base
    for name, strengths in (("0", seen), ("1", singular)):
        lost = float(strengths[rank:].norm())
        for tolerance, expected in ((1.001 * lost, rank), (0.999 * lost, rank + 1)):
            found = adapters.lowest_ranks([name], features, tolerance=tolerance)
            assert found == {name: expected}


def test_a_layer_weight_changes_the_scale_and_not_the_function_and_replaces_an_earlier_one():
    model = lora_chain(*WIDTHS)
    adapters = adapters_of(model)
    before = {name: added(layer) for name, layer in adapters.layers.items()}
    for weights in ({"0": 0.7, "1": 1.3}, {"0": 2.0, "1": 0.5, "2": 1.0}):
        adapters.apply_weights(weights)
        for name, weight in weights.items():
            assert adapters.layers[name].weight == pytest.approx(weight, rel=1e-7)
    scalings = {name: layer.scaling for name, layer in adapters.layers.items()}
    assert scalings == {"0": 3.0, "1": 0.75, "2": 1.5}
    for name, layer in adapters.layers.items():
        torch.testing.assert_close(added(layer), before[name])
        layer.module.set_scale("default", 1)
        assert layer.scaling == scalings[name]
    assert model.peft_config["default"].alpha_pattern == {"^(0)$": 12, "^(1)$": 3}
    adapters.apply_weights({"0": 1.0})
    assert adapters.layers["0"].scaling == 1.5


def test_a_layer_weight_keeps_the_output_of_a_bias_and_scales_its_moments_like_its_gradient():
    model = lora_chain(8, 10, lora_bias=True)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    adapters = LoraAdapters(model, optimizer, None, follow=lambda change: None)
    inputs = torch.randn(5, 8, dtype=torch.float64)
    bias = nn.init.normal_(model.base_model.model[0].lora_B.default.bias)

    def gradient():
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        return bias.grad

    first = gradient().clone()
    optimizer.step()
    with torch.no_grad():
        before = model(inputs)
    adapters.apply_weights({"0": 2.0})
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), before)
    torch.testing.assert_close(gradient(), 2 * first)
    torch.testing.assert_close(optimizer.state[bias]["exp_avg"], 0.1 * 2 * first)
    torch.testing.assert_close(optimizer.state[bias]["exp_avg_sq"], 1e-3 * (2 * first) ** 2)


@pytest.mark.parametrize(
    "name", ["signal", "gradient_norm", "fisher", "spectral", "sensitivity", "magnitude"]
)
def test_scores_do_not_depend_on_layer_weights_which_would_feed_back_on_themselves(name):
    model = lora_chain(*WIDTHS)
    adapters = adapters_of(model)
    inputs = torch.randn(3, 5, WIDTHS[0], dtype=torch.float64)

    def scores(change=None):
        metric = build_metric(name, seed=0)
        for place, batch in enumerate(inputs):
            if change is not None and place == 2:
                adapters.apply_weights(change)
            model.zero_grad()
            model(batch).square().sum().backward()
            metric.observe(adapters.with_gradients())
        return metric.scores(list(adapters.layers.values()), {})

    plain = scores()
    between = scores({"0": 2.0, "2": 0.5})
    assert between == pytest.approx(plain, rel=1e-5)
    assert scores() == pytest.approx(plain, rel=1e-5)


def test_a_model_rebuilt_from_a_weighted_adapter_learns_its_unweighted_scale():
    saved = adapters_of(lora_chain(*WIDTHS))
    saved.apply_weights({"0": 2.0})
    rebuilt = adapters_of(lora_chain(*WIDTHS, alpha_pattern={"^0": 12}))
    assert rebuilt.layers["0"].weight == 1.0
    rebuilt.load_shapes(saved.shapes())
    assert rebuilt.layers["0"].weight == 2.0
    rebuilt.apply_weights({"0": 1.0})
    assert rebuilt.layers["0"].scaling == 1.5


def test_moments_left_from_other_ranks_are_forgotten_when_attaching(caplog):
    caplog.set_level("INFO", logger="dynlora")
    model = lora_chain(*WIDTHS)
    optimizer = AdamW(lora_weights(model), lr=0.01)
    first = LoraAdapters(model, optimizer, None, follow=lambda change: None)
    set_gradients(layers_of(model), seed=0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    apply(first, {"0": 2})
    optimizer.load_state_dict(state)
    LoraAdapters(model, optimizer, None, follow=lambda change: None)
    assert caplog.messages == ["the moments of 2 parameters are of other ranks: they start anew"]
    others = [p for name in ("1", "2") for p in first.layers[name].parameters]
    assert {id(p) for p in optimizer.state} == {id(p) for p in others}
    set_gradients(layers_of(model), seed=1)
    optimizer.step()
    assert optimizer.state[first.layers["0"].lora_A]["exp_avg"].shape == (2, 8)


# What PEFT's configuration tells.


def test_ranks_are_told_of_one_adapter_where_several_were_made_of_one_configuration():
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1", "2"])
    model = get_peft_model(bare_chain(*WIDTHS), config)
    model.add_adapter("reference", config)
    apply(adapters_of(model), {"0": 1, "1": 2})
    assert model.peft_config["default"].rank_pattern == {"^(0)$": 1, "^(1)$": 2}
    assert model.peft_config["reference"].rank_pattern == {}
    assert config.rank_pattern == {}  # a cell that is run again begins with equal ranks


def test_ranks_are_told_though_memory_ran_out_while_a_layer_grew(monkeypatch):
    model = lora_chain(*WIDTHS, r=4)
    adapters = adapters_of(model)

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(lora_adapters.resize, "new_rows", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        apply(adapters, {"0": 1, "2": 6})
    assert ranks_of(adapters) == {"0": 1, "1": 4, "2": 4}
    assert model.peft_config["default"].rank_pattern == {"^(0)$": 1}


def test_an_adapter_that_was_deleted_and_added_anew_is_not_taken_for_the_old_one():
    model = lora_chain(*WIDTHS, r=4)
    adapters = adapters_of(model)
    config = model.peft_config["default"]
    model.add_adapter("other", config)
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    with pytest.raises(LayerError, match="was deleted"):
        adapters.check(0)
    with pytest.raises(LayerError, match="was deleted"):
        adapters.with_gradients()
