"""Adapters that begin with part of the base model's weights, or with directions of the data."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.utils.data import SequentialSampler
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from dynlora.errors import ConfigError
from dynlora.train.methods.prepare import prepare
from dynlora.train.methods.starts import begin_with_eva, write_difference
from tests.jobs import minimal_job
from tests.models import bare_llama
from tests.unit.train.methods.test_methods import prepared

TOKENS = torch.tensor([[2, 5, 7, 3]])
PEFT_REMARKS = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False", "ignore:Model has `tie_word_embeddings=True`"
)


def begun(base, start, targets, **lora):
    lora = {"r": 2, "init_lora_weights": start, "target_modules": targets} | lora
    return prepare(base, minimal_job(method="lora", task="causal_lm", lora=lora), 10)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, n_inner=16)
    )


def weights_of(model, names):
    found = {n.removesuffix(".base_layer"): m for n, m in model.named_modules()}
    return [found[name].weight for name in found if name.endswith(names)]


@PEFT_REMARKS
@torch.no_grad()
@pytest.mark.parametrize(
    ("base", "start", "targets", "lora"),
    [
        (bare_llama, "pissa_niter_4", ("q_proj", "down_proj"), {"modules_to_save": ["norm"]}),
        (bare_llama, "olora", ("q_proj", "down_proj"), {"modules_to_save": ["norm"]}),
        (gpt2, "pissa", ("c_attn", "c_proj"), {"use_rslora": True}),  # transposed layers
    ],
)
def test_a_saved_difference_on_the_original_model_is_the_trained_model(
    tmp_path, base, start, targets, lora
):
    ready = begun(base(), start, targets, **lora)
    model, original = ready.model, base().eval()
    before = model.eval()(TOKENS).logits
    torch.testing.assert_close(before, original(TOKENS).logits, atol=1e-5, rtol=0)
    for mine, theirs in zip(weights_of(model, targets), weights_of(original, targets), strict=True):
        assert not torch.equal(mine, theirs), "the base model gave a part away"
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) / 10)
    after = model(TOKENS).logits
    assert (after - before).abs().max() > 0.01
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    for _ in range(2):  # the second replaces the first
        write_difference(model, ready.first, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(TOKENS).logits, after, atol=1e-5, rtol=0)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    config = model.peft_config["default"]
    assert (config.init_lora_weights, config.r) == (start, 2)


@PEFT_REMARKS
@pytest.mark.parametrize(
    ("base", "start", "target", "told"),
    [
        # peft 0.21 decomposes a transposed weight as if it were not: of a square one, wrongly.
        (gpt2, "olora", "c_proj", r"Conv1D .*\(8, 8\)"),
        (gpt2, "pissa", "lm_head", "'lm_head', whose weight another module uses too"),
        (bare_llama, "pissa", "embed_tokens", "got 'model.embed_tokens' of type Embedding"),
    ],
)
def test_a_layer_that_cannot_give_a_part_away_is_refused(base, start, target, told):
    with pytest.raises(ConfigError, match=told):
        begun(base(), start, [target])


def trainer(rows, batch=4):
    """Return the part of a Trainer that EVA reads."""
    return SimpleNamespace(
        train_dataset=rows,
        args=SimpleNamespace(train_batch_size=batch),
        sampler=SequentialSampler(rows),
        data_collator=default_data_collator,
    )


def rows(*, padding=0, count=24, label=0):
    tokens = torch.randint(1, 20, (count, 6), generator=torch.Generator().manual_seed(5))
    return [
        {"input_ids": row, "attention_mask": row.sign(), "labels": torch.tensor(label)}
        for row in torch.nn.functional.pad(tokens, (0, padding))
    ]


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_lora_a_spans_the_first_principal_directions_of_a_layers_inputs():
    model = prepared("lora").model
    seen = []
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query
    given = rows()
    begin_with_eva(trainer(given, batch=24), model)
    query.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    batch = default_data_collator(given)
    model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    inputs = seen[0].flatten(0, 1)
    directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)[2][:2]
    found = query.lora_A["default"].weight.detach()
    torch.testing.assert_close((found @ directions.T).abs(), torch.eye(2), atol=0.02, rtol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(2), atol=1e-5, rtol=0)


def test_only_lora_a_changes_and_no_random_number_is_drawn():
    model = prepared("lora").model
    before, state = factors(model), torch.random.get_rng_state()
    held = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    model.train()
    begin_with_eva(trainer(rows()), model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == held
    for name, tensor in factors(model).items():
        assert torch.equal(tensor, before[name]) == ("lora_B" in name), name
        assert tensor.shape == before[name].shape
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_neither_labels_nor_padding_matter():
    found = []
    for padding, label in ((0, 0), (3, 1)):
        model = prepared("lora").model
        begin_with_eva(trainer(rows(padding=padding, label=label)), model)
        found.append({n: t for n, t in factors(model).items() if "lora_A" in n})
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-4, rtol=0)


def test_inputs_that_never_fill_the_rank_are_refused(capsys, monkeypatch):
    monkeypatch.setattr("dynlora.train.methods.starts.PATIENCE", 1)
    model = prepared("lora").model
    with pytest.raises(ConfigError, match=r"lora.r=2 directions .* settle in 100 batches"):
        begin_with_eva(trainer(rows(count=4), batch=1), model)  # one row a batch for the pooler
    assert capsys.readouterr().out == "", "PEFT prints; the result of a verb stands there"
