"""Each kind of LoRA layer by its own forward: what its matrices, tokens and norms stand for."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dynlora.adapters.layers import find_lora_layers
from dynlora.errors import LayerError
from tests.layer_kinds import CASES


def lora_on(base, *, r=4, **settings):
    """Return the only LoRA layer of a model of one, both its factors random and in float64."""
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=6, target_modules=["0"], **settings)
    model = get_peft_model(nn.Sequential(base), config).double()
    (layer,) = find_lora_layers(model, None)
    for parameter in layer.parameters:
        nn.init.normal_(parameter, std=0.5)
        parameter.grad = torch.zeros_like(parameter)
    return layer


CONVS = {
    "3x3": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "stride": lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(0, 1)),
    "same": lambda: nn.Conv2d(3, 5, (5, 3), padding="same"),
    "valid": lambda: nn.Conv2d(3, 5, 2, padding="valid"),
    "reflect": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "1x1": lambda: nn.Conv2d(3, 5, 1, stride=2),
}
LAYERS = {
    "Linear": lambda: lora_on(nn.Linear(8, 6)),
    "Conv1D": lambda: lora_on(Conv1D(6, 8), fan_in_fan_out=True),
    "Embedding": lambda: lora_on(nn.Embedding(10, 6)),
    **{f"Conv2d {name}": lambda make=make: lora_on(make()) for name, make in CONVS.items()},
}
INPUTS = {
    "Linear": lambda: torch.randn(3, 5, 8).double(),
    "Conv1D": lambda: torch.randn(3, 5, 8).double(),
    "Embedding": lambda: torch.randint(0, 10, (3, 5)),
    **{f"Conv2d {name}": lambda: torch.randn(3, 3, 7, 6).double() for name in CONVS},
}


@torch.no_grad()
def forward(layer, inputs):
    """Return the layer's output and what of it the adapter adds, as rows over the last axis."""
    output = layer.module(inputs)
    added = output - layer.module.get_base_layer()(inputs)
    if output.dim() == 4:
        output, added = (t.permute(0, 2, 3, 1) for t in (output, added))
    return output.flatten(0, -2), added.flatten(0, -2)


@pytest.mark.parametrize("kind", LAYERS)
def test_matrices_and_norm_are_those_of_the_parameters_whose_memory_they_share(kind):
    layer = LAYERS[kind]()
    layer.module(INPUTS[kind]()).square().sum().backward()
    for matrix, grad, parameter, factor in zip(
        (layer.lora_A, layer.lora_B),
        (layer.grad_A, layer.grad_B),
        layer.parameters,
        (layer.factor_A, layer.factor_B),
        strict=True,
    ):
        assert matrix.data_ptr() == parameter.data_ptr()
        assert torch.equal(factor.from_matrix(matrix), parameter)
        assert torch.equal(factor.from_matrix(grad), parameter.grad)
        assert parameter.shape[factor.rank_axis] == 4
    base = layer.module.get_base_layer().weight.detach()
    assert layer.base_norm == pytest.approx(float(base.square().sum().sqrt()), rel=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_tokens_are_read_in_the_outputs_order_with_what_the_adapter_adds_and_its_power(kind):
    layer, inputs = LAYERS[kind](), INPUTS[kind]()
    output, added = forward(layer, inputs)
    with torch.no_grad():
        rows = layer.rows(inputs, layer.module(inputs))
        tokens, outputs = rows.read(torch.arange(len(output)))
    assert rows.shape[0] == 3
    torch.testing.assert_close(outputs, output)
    if kind == "Embedding":
        ours = layer.scaling * layer.lora_B[tokens] @ layer.lora_A
    else:
        ours = layer.scaling * tokens @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(ours.detach(), added)
    expected = added.square().sum(dim=1).mean()
    if kind == "Embedding":  # ids seen once, and one more, stand for those not seen
        _, all_ids = forward(layer, torch.arange(10)[None])
        unseen = (sum(tokens.tolist().count(i) == 1 for i in range(10)) + 1) / 16
        assert unseen > 2 / 16
        expected = (1 - unseen) * expected + unseen * all_ids.square().sum(dim=1).mean()
    assert layer.added_power(tokens) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("case", ["NF4", "int8"])
def test_the_norm_of_a_quantised_weight_is_that_of_the_numbers_it_stands_for(case):
    (layer,) = [
        x
        for x in find_lora_layers(CASES[case].model(), None)
        if x.name.endswith("0.self_attn.q_proj")
    ]
    base = layer.module.get_base_layer()
    weight = base.train()(torch.eye(base.in_features))
    assert layer.base_norm == pytest.approx(float(weight.norm()), rel=0.01)
    assert layer.base_norm < float(base.weight.float().norm()) / 100


def test_an_embedding_that_scales_its_output_is_measured_scaled():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    layer = lora_on(Scaled(10, 6))
    ids = torch.arange(10)[None]
    _, added = forward(layer, ids)
    assert layer.added_power(ids.flatten()) == pytest.approx(
        float(added.square().sum(dim=1).mean()), rel=1e-6
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("base", "told"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), r"nn\.Conv2d with groups=1, got groups=2"),
        (lambda: nn.Embedding(10, 6, max_norm=1.0), r"Embedding .* max_norm=1\.0 and sparse=False"),
        (lambda: nn.Embedding(10, 6, sparse=True), r"Embedding .* max_norm=None and sparse=True"),
    ],
)
def test_a_layer_whose_settings_forbid_other_ranks_is_refused_by_them(base, told):
    with pytest.raises(LayerError, match=rf"'0' must be on an .*{told}"):
        lora_on(base())
