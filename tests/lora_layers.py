"""Chains of linear layers with LoRA, whose weights and gradients tests set by hand."""

import itertools
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dynlora.adapters.layers import LoraView, find_lora_layers
from dynlora.types import FeatureStats


def lora_chain(
    *widths: int, r: int = 4, seed: int = 0, dtype: torch.dtype = torch.float64, **lora: object
) -> nn.Module:
    """Return linear layers "0", "1", ... between these widths, with random `lora_A` and `lora_B`.

    A `lora_B` of zeros, as PEFT makes it, would hide most mistakes. Gradients are there and zero:
    the tests' type checker reads every field of a layer.
    """
    torch.manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    base = nn.Sequential(*(nn.Linear(n_in, n_out) for n_in, n_out in pairs)).to(dtype)
    targets = [str(index) for index in range(len(pairs))]
    settings = {"lora_alpha": 6, "target_modules": targets} | lora
    model = get_peft_model(base, LoraConfig(r=r, **settings)).to(dtype)
    for layer in find_lora_layers(model, None):
        nn.init.normal_(layer.lora_A, std=0.5)
        nn.init.normal_(layer.lora_B, std=0.5)
        layer.lora_A.grad, layer.lora_B.grad = map(torch.zeros_like, (layer.lora_A, layer.lora_B))
    return model


def layers_of(model: nn.Module) -> list[LoraView]:
    """Return the model's LoRA layers."""
    return find_lora_layers(model, None)


def one_layer(n_in: int = 12, n_out: int = 8, **given: object) -> LoraView:
    """Return the only layer of a chain of one."""
    return layers_of(lora_chain(n_in, n_out, **given))[0]


def stack(experts: int, n_in: int = 12, n_out: int = 8, *, r: int = 4) -> LoraView:
    """Return LoRA on a parameter of one weight per expert, with random factors."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Module())
    base[0].weights = nn.Parameter(torch.zeros(experts, n_out, n_in, dtype=torch.float64))
    config = LoraConfig(r=r, lora_alpha=6, target_modules=[], target_parameters=["0.weights"])
    [layer] = find_lora_layers(get_peft_model(base, config), None)
    for parameter in layer.parameters:
        nn.init.normal_(parameter, std=0.5)
        parameter.grad = torch.zeros_like(parameter)
    return layer


def added(layer: LoraView) -> Tensor:
    """Return what the adapter adds to the base weight."""
    return layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach()


def set_gradients(layers: Sequence[LoraView], *, seed: int) -> None:
    """Give every LoRA weight a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for weight in (layer.lora_A, layer.lora_B):
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.grad = noise.to(weight.dtype)


def set_gradient_B(layer: LoraView, gradient: Tensor) -> None:
    """Give `lora_B` this gradient and `lora_A` none to speak of."""
    layer.lora_A.grad = torch.zeros_like(layer.lora_A)
    layer.lora_B.grad = gradient.to(layer.lora_B.dtype)


def stats_of(layer: LoraView, tokens: Tensor) -> FeatureStats:
    """Return the statistics of these inputs, worked out from the layer's own forward."""
    with torch.no_grad():
        output = layer.module(tokens.to(layer.lora_A.dtype))
    return FeatureStats(
        tokens=tokens,
        variance=float(tokens.var(dim=0, correction=0).mean()),
        effective_rank=float(min(tokens.shape)),
        output_power=float(output.square().sum(dim=1).mean()),
    )
