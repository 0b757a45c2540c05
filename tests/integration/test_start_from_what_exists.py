"""Adapters of any start: trained before, several at once, tied, in groups, switched off."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import AdamW

from dynlora import RankPlan
from dynlora.errors import LayerError
from tests.adapters import outputs
from tests.layer_kinds import CASES
from tests.models import adamw, attached, bare_llama, lora_llama, loss_of, sequences, train, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*embedding.*:UserWarning")

OWN = {
    "r": 6,
    "lora_alpha": 12,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 9},
    "alpha_pattern": {"q_proj": 5, "v_proj": 20},
    "modules_to_save": ["lm_head"],
    "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
}
MOVING = {"hysteresis": 0, "shrink_tolerance": 1.0, "importance": "random"}


@torch.no_grad()
def logits(model):
    return model(input_ids=next(sequences(batch=16, seed=9))).logits


def continued(folder):
    return PeftModel.from_pretrained(bare_llama(), folder, is_trainable=True)


def test_an_adapter_trained_before_is_continued_with_its_own_ranks_scales_budget_and_modules(
    tmp_path,
):
    torch.manual_seed(1)
    first = get_peft_model(bare_llama(), LoraConfig(**OWN))  # trained without us
    train(first, adamw(first), None, 30)
    first.save_pretrained(tmp_path / "first")
    model = continued(tmp_path / "first")
    before, optimizer = logits(model), adamw(model)
    dynamic = attached(model, optimizer, total_steps=40, **MOVING)
    start = dict(dynamic.ranks)
    assert start["model.layers.0.self_attn.q_proj"] == 3
    assert start["model.layers.1.mlp.down_proj"] == 9
    assert start["model.layers.0.mlp.down_proj"] == 6
    scales = {layer.name: layer.scaling for layer in dynamic._layers}
    assert scales["model.layers.0.self_attn.q_proj"] == 5 / 3**0.5
    assert scales["model.layers.1.self_attn.v_proj"] == 20 / 6**0.5
    assert scales["model.layers.1.mlp.down_proj"] == 12 / 9**0.5
    live = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert dynamic.budget == max(live, sum(6 * layer.cost for layer in dynamic._layers))
    assert torch.equal(logits(model), before)

    head = model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight
    head_before = head.detach().clone()
    losses = train(model, optimizer, dynamic, 40)
    assert losses[-1] < losses[0]
    assert dynamic.ranks != start
    assert not torch.equal(head, head_before)
    assert {layer.name: layer.scaling for layer in dynamic._layers} == scales
    model.save_pretrained(tmp_path / "second")
    again = continued(tmp_path / "second")
    assert torch.equal(logits(again), logits(model))
    its = attached(again, adamw(again), total_steps=40)
    assert its.ranks == dynamic.ranks
    for layer in its._layers:
        assert layer.scaling == pytest.approx(scales[layer.name], rel=1e-15)


@pytest.fixture(scope="module")
def moved_ranks(tmp_path_factory):
    """Save an adapter whose ranks a run has moved; return the folder and its saved ranks."""
    folder = tmp_path_factory.mktemp("moved")
    model = lora_llama(r=8)
    trained(model, 40, total_steps=40, **MOVING)
    model.save_pretrained(folder)
    return folder, saved_ranks(folder)


def saved_ranks(folder):
    saved = load_file(folder / "adapter_model.safetensors")
    return {key: len(tensor) for key, tensor in saved.items() if "lora_A" in key}


def test_an_adapter_continued_on_random_labels_keeps_its_ranks(moved_ranks, tmp_path):
    folder, ranks = moved_ranks
    assert max(ranks.values()) - min(ranks.values()) >= 8
    model = continued(folder)
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=40)
    generator = torch.Generator().manual_seed(5)
    pairs = (torch.randint(0, 16, (2, 8, 12), generator=generator) for _ in range(40))
    train(model, optimizer, dynamic, 40, ({"input_ids": x, "labels": y} for x, y in pairs))
    assert dynamic.history[-1].step == 24  # nearly three fifths of the run
    assert {layer.score for event in dynamic.history for layer in event.layers.values()} == {None}
    model.save_pretrained(tmp_path / "second")
    assert saved_ranks(tmp_path / "second") == ranks


def test_a_larger_r_grows_a_continued_adapter_without_scores_and_changes_no_output(
    moved_ranks, tmp_path
):
    folder, ranks = moved_ranks
    model = continued(folder)
    model.peft_config["default"].r = 12
    optimizer = adamw(model, lr=0.0)
    dynamic = attached(model, optimizer, total_steps=40, importance="uniform")
    assert dynamic.budget == 12 * sum(layer.cost for layer in dynamic._layers)
    before = logits(model)
    model.save_pretrained(tmp_path / "at the start")
    assert saved_ranks(tmp_path / "at the start") == ranks
    assert torch.equal(logits(continued(tmp_path / "at the start")), before)
    train(model, optimizer, dynamic, 40)
    assert dynamic.budget - dynamic.parameters < min(layer.cost for layer in dynamic._layers)
    for layer in dynamic._layers:
        held = ranks[f"base_model.model.{layer.name}.lora_A.weight"]
        assert held <= layer.r
        # Layers at their full rank leave a part to the others.
        assert abs(layer.r - min(1.5 * held, layer.widest)) < 2
    assert (logits(model) - before).abs().max() <= 1e-6
    train(model, adamw(model), None, 1)
    assert all(layer.lora_B.any(dim=0).all() for layer in dynamic._layers)


@pytest.mark.parametrize("kind", CASES)
def test_only_the_named_adapter_moves_and_the_others_stay_bit_for_bit(kind):
    case = CASES[kind]
    model = case.model(r=4).train()
    settings = dict(case.lora)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=6, **settings))
    for name, parameter in model.named_parameters():
        if ".other" in name:
            nn.init.normal_(parameter, std=0.1)
    fields = ("r", "lora_alpha", "scaling")

    def other():
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if ".other" in n}
        modules = [m for m in model.modules() if "lora_alpha" in vars(m)]
        told = [[copy.copy(vars(m)[field]["other"]) for field in fields] for m in modules]
        return weights, told, vars(model.peft_config["other"]).copy()

    before = other()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    dynamic = attached(model, optimizer, total_steps=1000)
    ranks = dict.fromkeys(dynamic.ranks, 2)
    model(**next(case.batches())).loss.backward()
    optimizer.step()
    dynamic.apply(RankPlan(step=1, ranks=ranks))
    dynamic.apply(RankPlan(step=1, ranks={case.layer: 4}))
    after = other()
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]
    assert dynamic.ranks == ranks | {case.layer: 4}
    model.set_adapter("other")
    assert torch.isfinite(model(**next(case.batches())).logits).all()


@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
def test_lora_plus_groups_keep_their_parameters_rates_and_moments(kind):
    case = CASES[kind]
    model = case.model().train()
    optimizer = create_loraplus_optimizer(
        model, AdamW, lr=2e-3, loraplus_lr_ratio=8, loraplus_lr_embedding=4e-3
    )
    dynamic = attached(model, optimizer, total_steps=40, **MOVING)

    def groups():
        return [
            (g["lr"], g["weight_decay"], [id(p) for p in g["params"]])
            for g in optimizer.param_groups
        ]

    before = groups()
    losses = train(model, optimizer, dynamic, 40, case.batches())
    ranks = {tuple(x.rank_after for x in event.layers.values()) for event in dynamic.history}
    assert groups() == before
    assert {lr for lr, *_ in before} >= {2e-3, 1.6e-2}
    assert len(ranks) > 2
    assert losses[-1] < losses[0]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


@pytest.mark.parametrize(("with_grad", "checkpointing"), [(True, False), (False, True)])
def test_a_pass_without_the_adapter_while_training_is_not_observed(with_grad, checkpointing):
    runs = []
    for reference in (False, True):
        model = lora_llama(r=4).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = adamw(model)
        dynamic = attached(model, optimizer, total_steps=40, **MOVING | {"importance": "signal"})

        def loss(model, tokens, reference=reference):
            value = loss_of(model, tokens)
            if reference:
                with model.disable_adapter(), torch.set_grad_enabled(with_grad):
                    pull = model(input_ids=tokens).logits
                value = value + 0 * pull.detach().mean()
            return value

        train(model, optimizer, dynamic, 40, loss=loss)
        runs.append((dynamic, {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}))
    (plain, weights), (dynamic, its_weights) = runs
    assert dynamic.history == plain.history
    assert len(set(dynamic.ranks.values())) > 1
    assert all(torch.equal(weights[name], its_weights[name]) for name in weights)


def tied_llama(**lora):
    base = bare_llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], **lora)
    return get_peft_model(base, config)


def test_adapters_that_peft_ties_are_refused_by_both_names():
    model = tied_llama(ensure_weight_tying=True)
    message = re.escape(
        "got 'lm_head' tied to 'model.embed_tokens': set `ensure_weight_tying=False`"
    )
    with pytest.raises(LayerError, match=message):
        attached(model, adamw(model))


def test_adapters_whose_weights_are_parts_of_one_buffer_move_each_for_itself():
    model = lora_llama().train()
    weights = [p for p in model.parameters() if p.requires_grad]
    vector_to_parameters(parameters_to_vector(weights).detach(), weights)
    _, dynamic = trained(model, 30, total_steps=30)
    assert len(set(dynamic.ranks.values())) > 1


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_adapters_of_their_own_on_tied_base_weights_move_each_for_itself():
    model = tied_llama(ensure_weight_tying=False).train()
    optimizer, dynamic = trained(model, 10, importance="uniform", total_steps=1000)
    assert dynamic.ranks.keys() >= {"model.embed_tokens", "lm_head"}
    dynamic.apply(RankPlan(step=10, ranks={"lm_head": 1, "model.embed_tokens": 2}))
    before = logits(model)
    dynamic.apply(RankPlan(step=10, ranks={"model.embed_tokens": 4}))
    assert (logits(model) - before).abs().max() <= 1e-6
    assert (dynamic.ranks["lm_head"], dynamic.ranks["model.embed_tokens"]) == (1, 4)
    assert train(model, optimizer, dynamic, 10)[-1] > 0


@pytest.mark.filterwarnings("ignore:.*EVA config", "ignore:lora with eva")
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_peft_loads_moved_ranks_after_any_start(start, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    model = get_peft_model(bare_llama(), lora)
    optimizer, dynamic = trained(model, 2, total_steps=100)
    ranks = dict(zip(dynamic.ranks, [3, 5, 3, 4], strict=True))
    dynamic.apply(RankPlan(step=2, ranks=ranks))
    train(model, optimizer, dynamic, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(), tmp_path)
    assert torch.equal(outputs(loaded.eval()), outputs(model.eval()))
    assert lora.init_lora_weights == start
