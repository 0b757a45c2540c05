"""Fused forwards: what PEFT computes, in fewer operations, and PEFT's own wherever they cannot."""

import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynlora.fused import function as fused_linear
from dynlora.fused import layers as fused_module
from dynlora.fused.layers import FusedLora, close_fused
from tests.adapters import randomised
from tests.lora_layers import layers_of
from tests.models import bare_bert, bare_llama

MODELS = {"bert": bare_bert, "llama": bare_llama}
TOKENS = torch.arange(60).reshape(3, 20) % 16


def lora_model(kind="bert", dtype=torch.float64, **lora):
    """Return a model with LoRA of random weights on all linear layers, in training mode."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | lora
    model = get_peft_model(MODELS[kind](), LoraConfig(**settings))
    return randomised(model).to(dtype).train()


def computed(model, tokens=TOKENS, seed=0, **kwargs):
    """Return the output of one forward, and the gradients of all trained weights."""
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(input_ids=tokens, **kwargs)[0]
    (output.double().square().mean() + output[..., 0].double().mean()).backward()
    weights = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach()} | weights


def assert_same(one, other, tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        size = float(value.double().abs().max())
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance * size, msg=name)


def bases(model):
    """Return the linear layers under the adapters."""
    return [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]


@pytest.fixture(params=["merged", "beside"])
def way(request, monkeypatch):
    """Let products be made in one way whatever the shapes are."""
    monkeypatch.setattr(fused_linear, "pays_to_merge", lambda *_: request.param == "merged")
    return request.param


@pytest.mark.parametrize(
    ("kind", "dtype", "dropout"),
    [("bert", torch.float64, 0.0), ("bert", torch.float64, 0.5), ("llama", torch.float32, 0.0)],
)
@pytest.mark.usefixtures("way")
def test_outputs_and_gradients_are_those_of_peft(kind, dtype, dropout):
    model = lora_model(kind, dtype, lora_dropout=dropout)
    want = computed(model)
    fused = FusedLora(model)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    assert len(fused.layers) == len(bases(model))
    for _ in range(2):
        assert_same(want, computed(model), tolerance)


def test_calls_too_small_to_gain_are_pefts_own_to_the_last_bit(monkeypatch):
    model = lora_model("llama", torch.float32, lora_dropout=0.5)
    want = computed(model)
    largest = TOKENS.numel() * max(sum(base.weight.shape) for base in bases(model))
    monkeypatch.setattr(fused_module, "LEAST_ELEMENTS", largest + 1)
    FusedLora(model)
    assert_same(want, computed(model), 0)
    monkeypatch.setattr(fused_module, "LEAST_ELEMENTS", largest)
    assert_same(want, computed(model), 1e-5)  # the largest layers are fused now


def test_autocast_gives_what_it_gives_peft_to_its_precision():
    model = lora_model(dtype=torch.float32)
    exact = computed(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = computed(model)
        FusedLora(model)
        for _ in range(2):
            got = computed(model)
            assert_same(want, got, 0.05)
    errors = [
        sum(float((each[name] - exact[name]).square().sum()) for name in exact)
        for each in (want, got)
    ]
    assert errors[1] < 1.2 * errors[0], "no further from float32 than autocast itself"


@torch.no_grad()
def scale_base(layer):
    layer.module.base_layer.weight.mul_(0.5)


def restart(layer):
    """Merge and begin anew, as ReLoRA does."""
    layer.module.merge()
    layer.module.merged_adapters.clear()
    torch.nn.init.zeros_(layer.lora_B)


@pytest.mark.parametrize("change", [scale_base, restart])
def test_a_changed_base_weight_is_seen_under_autocast(change):
    got = []
    for fuse in (True, False):
        model = lora_model(dtype=torch.float32)
        fused = FusedLora(model) if fuse else None
        with torch.autocast("cpu", torch.bfloat16):
            computed(model)
        for layer in layers_of(model):
            change(layer)
        with torch.autocast("cpu", torch.bfloat16):
            got.append(computed(model))
        if fused is not None:
            fused.close()
            assert all("merge" not in vars(layer.module) for layer in layers_of(model))
    assert_same(*got, 0.05)


def test_closed_and_at_inference_it_is_peft_to_the_last_bit():
    model = lora_model(dtype=torch.float32)
    want = computed(model)
    with torch.no_grad():
        inferred = model(input_ids=TOKENS)[0]
    fused = FusedLora(model)
    computed(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS)[0], inferred)
    fused.close()
    assert_same(want, computed(model), 0)


class Crossed(nn.Module):
    """Query of one tensor; key of another, or of the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, other):
        return self.query(x) * self.key(other)


def crossed_pair(dtype=torch.float64):
    config = LoraConfig(r=2, target_modules=["query", "key"])
    models = [get_peft_model(Crossed(), config) for _ in range(2)]
    for model in models:
        randomised(model).to(dtype).train()
    FusedLora(models[1])
    return models


@pytest.mark.usefixtures("way")
def test_a_batch_without_rows_gives_none():
    plain, model = crossed_pair()
    for rows in ((4, 6), (0, 6), (2, 0, 6)):
        x = torch.ones(rows, dtype=torch.float64)
        outputs = []
        for each in (plain, model):
            outputs.append(each(x, x))
            outputs[-1].sum().backward()
        torch.testing.assert_close(*outputs)


def other_base():
    torch.manual_seed(3)
    return nn.Linear(6, 6).requires_grad_(False)


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * x


class TripledLinear(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def other_factor(layer):
    factor = TripledLinear(6, 3, bias=False)
    factor.weight = layer.lora_A["default"].weight
    return factor


BETWEEN = {
    "nothing": lambda model, key, x, stack: None,
    "adapter disabled": lambda model, key, x, stack: stack.enter_context(model.disable_adapter()),
    "another adapter": lambda model, key, x, stack: model.set_adapter("other"),
    "both adapters": lambda model, key, x, stack: model.base_model.set_adapter(
        ["default", "other"]
    ),
    "adapter merged": lambda model, key, x, stack: key.merge(),
    "no gradients": lambda model, key, x, stack: stack.enter_context(torch.no_grad()),
    "autocast": lambda model, key, x, stack: stack.enter_context(
        torch.autocast("cpu", torch.bfloat16)
    ),
    "evaluation": lambda model, key, x, stack: model.eval(),
    "lora_A": lambda model, key, x, stack: key.lora_A["default"].weight.data.mul_(3),
    "lora_B": lambda model, key, x, stack: key.lora_B["default"].weight.data.mul_(3),
    "weight": lambda model, key, x, stack: key.base_layer.weight.data.mul_(3),
    "bias": lambda model, key, x, stack: key.base_layer.bias.data.add_(3),
    "scaling": lambda model, key, x, stack: key.scale_layer(3),
    "other forward": lambda model, key, x, stack: setattr(
        key.base_layer, "forward", lambda x, original=key.base_layer.forward: 2 * original(x)
    ),
    "hook": lambda model, key, x, stack: key.lora_B["default"].register_forward_hook(
        lambda _module, _args, output: 3 * output
    ),
    "backward hook": lambda model, key, x, stack: key.lora_B["default"].register_full_backward_hook(
        lambda _module, inputs, _outputs: tuple(3 * gradient for gradient in inputs)
    ),
    "pre-hook": lambda model, key, x, stack: key.lora_B["default"].register_full_backward_pre_hook(
        lambda _module, outputs: tuple(3 * gradient for gradient in outputs)
    ),
    "hook of the dropout": lambda model, key, x, stack: key.lora_dropout[
        "default"
    ].register_forward_hook(lambda _module, _args, output: 3 * output),
    "other dropout": lambda model, key, x, stack: key.lora_dropout.update({"default": Tripled()}),
    "other factor": lambda model, key, x, stack: key.lora_A.update({"default": other_factor(key)}),
    "trained base": lambda model, key, x, stack: key.base_layer.requires_grad_(),
    "other base": lambda model, key, x, stack: setattr(key, "base_layer", other_base()),
}
"""What may change between the calls of two layers that read one tensor, by what it changes."""


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("change", BETWEEN)
def test_a_layer_reads_the_state_of_its_own_call_whatever_changed_since_another(change):
    found = []
    for each in crossed_pair(torch.float32):
        torch.manual_seed(0)
        each.add_adapter("other", LoraConfig(r=3, target_modules=["key"], init_lora_weights=False))
        layers = each.base_model.model
        x = torch.linspace(-1, 1, 24).reshape(4, 6)
        each(x, x).sum().backward()
        with ExitStack() as stack:
            query = layers.query(x).detach().clone()
            BETWEEN[change](each, layers.key, x, stack)
            key = layers.key(x)
            factors = [p for p in layers.key.parameters() if p.requires_grad and key.requires_grad]
            gradients = torch.autograd.grad(key.square().sum(), factors) if factors else ()
        found.append([query, key.detach(), *gradients])
    tolerance = 0.05 if change == "autocast" else 1e-5
    for want, got in zip(*found, strict=True):
        size = float(want.abs().max())
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * size)


def test_closed_layers_run_pefts_forward_inside_a_wrapper():
    plain, model = crossed_pair(torch.float32)
    query = model.base_model.model.query
    query.forward = lambda x, inner=query.forward: inner(x)
    close_fused(model)
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    assert torch.equal(model(x, x), plain(x, x))
    assert "forward" in vars(query), "the wrapper stays"


@pytest.mark.usefixtures("way")
def test_outputs_may_be_changed_in_place():
    plain, model = crossed_pair()
    for _ in range(2):
        gradients = []
        for each in (plain, model):
            each.zero_grad()
            x = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(2, 4, 6)
            layers = each.base_model.model
            (layers.query(x).relu_() + layers.key(x).mul_(2)).sum().backward()
            gradients.append(
                {n: p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}
            )
        assert_same(*gradients, 1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_traces_peft_itself():
    plain, model = crossed_pair()
    x = torch.randn(4, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x), plain(x, x))
    torch._dynamo.reset()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_or_a_pickle_of_the_model_is_fused_on_its_own(way):
    model, plain = lora_model(), lora_model()
    FusedLora(model)
    computed(model)
    other = way(model)
    assert all(vars(layer.module)["forward"]._module is layer.module for layer in layers_of(other))
    with torch.no_grad():
        for weight in (*other.parameters(), *plain.parameters()):
            weight.mul_(1.1)
    assert_same(computed(plain), computed(other), 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_less_is_kept_for_the_backward_pass_than_by_peft(autocast):
    def kept(model):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=TOKENS)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                output = model(input_ids=TOKENS)[0]
        frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del output
        return sum(size for place, size in storages.items() if place not in frozen)

    model = lora_model(dtype=torch.float32)
    plain = kept(model)
    FusedLora(model)
    assert kept(model) <= plain


def test_a_whole_weight_is_formed_where_rows_are_many_and_nothing_is_rounded_away():
    least = 2 * 96 * 32 // 128
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = torch.zeros(96, 32, dtype=dtype)
        assert not fused_linear.pays_to_merge(weight, least)
        exact = dtype is not torch.bfloat16
        assert fused_linear.pays_to_merge(weight, least + 1) == exact
