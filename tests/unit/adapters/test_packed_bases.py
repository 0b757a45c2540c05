"""LoRA on bases of GPTQ, AWQ and torchao: PEFT's own layers and dispatch, on stand-ins for bases.

Their packages need not be installed: the stand-ins store 8-bit weights, and only forward,
dequantization and names are theirs.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import awq, gptq, torchao
from peft.utils import other
from torch import Tensor, nn

from dynlora import RankPlan
from dynlora.importance.agreement import AgreementTest
from tests.models import adamw, attached, train

WIDTH = 24


def rounded(weight):
    """Return a weight of shape (out, in) as 8-bit integers and a scale per output."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scales).round().to(torch.int8), scales


class PackedLinear(nn.Module):
    """As of gptqmodel: no `weight`."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.in_features = self.out_features = WIDTH
        self.SUPPORTS_METHODS = [SimpleNamespace(value=method)]
        qweight, scales = rounded(nn.Linear(WIDTH, WIDTH).weight.detach())
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=False)

    def dequantized(self) -> Tensor:
        return self.qweight * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)


class PackedTensor(Tensor):
    """As of torchao: the weight of an `nn.Linear` that dequantizes in each product."""

    @staticmethod
    def __new__(cls, qweight: Tensor, scales: Tensor) -> "PackedTensor":
        made = Tensor._make_wrapper_subclass(cls, qweight.shape, dtype=scales.dtype)
        made.qweight, made.scales = qweight, scales
        return made

    def dequantize(self) -> Tensor:
        return self.qweight * self.scales

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            return function(args[0], args[1].dequantize(), *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        assert op is torch.ops.aten.detach.default
        return PackedTensor(args[0].qweight, args[0].scales)


PackedTensor.__module__ = "torchao.stand_in"


def packed_by(method):
    if method != "torchao":
        return PackedLinear(method)
    base = nn.Linear(WIDTH, WIDTH)
    weight = PackedTensor(*rounded(base.weight.detach()))
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


def bare_net(method):
    torch.manual_seed(0)
    return nn.Sequential(packed_by(method), nn.ReLU(), packed_by(method))


def loss(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def batches():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(WIDTH, WIDTH, generator=generator)
    while True:
        inputs = torch.randn(64, WIDTH, generator=generator)
        yield inputs, inputs @ wanted


@pytest.fixture(params=["gptq", "awq", "torchao"])
def method(request, monkeypatch):
    """Let PEFT find the stand-ins under the names of their packages."""
    names = {
        "gptqmodel": {},
        "gptqmodel.nn_modules": {},
        "gptqmodel.nn_modules.qlinear": {"BaseQuantLinear": PackedLinear},
        "torchao": {},
        "torchao.utils": {"TorchAOBaseTensor": PackedTensor},
        "torchao.quantization": {"Int4Tensor": type("Int4Tensor", (), {})},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for module in (gptq, awq, other):
        monkeypatch.setattr(module, "is_gptqmodel_available", lambda: True)
    monkeypatch.setattr(torchao, "is_torchao_available", lambda: True)
    monkeypatch.setattr(AgreementTest, "is_significant", lambda self: True)
    return request.param


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")
def test_ranks_move_on_packed_weights_and_stock_peft_loads_them(method, tmp_path):
    model = get_peft_model(bare_net(method), LoraConfig(r=4, target_modules=["0", "2"]))
    optimizer = adamw(model)
    dynamic = attached(
        model, optimizer, total_steps=30, importance="random", hysteresis=0, shrink_tolerance=1.0
    )
    first = dynamic._layers[0]
    kinds = {"gptq": "GPTQLoraLinear", "awq": "AwqLoraLinear", "torchao": "TorchaoLoraLinear"}
    assert type(first.module).__name__ == kinds[method]
    losses = train(model, optimizer, dynamic, 30, batches(), loss=loss)
    assert losses[-1] < losses[0]
    assert len(set(dynamic.ranks.values())) > 1
    base = first.module.get_base_layer()
    dequantized = base.weight.dequantize() if method == "torchao" else base.dequantized()
    assert first.base_norm == pytest.approx(float(dequantized.norm()), rel=1e-5)
    inputs, _ = next(batches())
    dynamic.apply(RankPlan(step=30, ranks={"0": 2, "2": 2}))
    before = model(inputs)
    dynamic.apply(RankPlan(step=30, ranks={"0": 3, "2": 5}))
    grown = model(inputs)
    torch.testing.assert_close(grown, before, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_net(method), tmp_path)
    assert torch.equal(loaded(inputs), grown)
