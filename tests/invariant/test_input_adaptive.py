"""Input-adaptive ranks: real, by the example's own tokens alone, exact to resume, off at will."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dynlora import InputAdaptiveRanks, RankPlan
from dynlora.adapters.layers import find_lora_layers
from dynlora.errors import EngineError
from dynlora.input_adaptive.complexity import components_used
from dynlora.integrations.checkpoint import load_state, save_state
from tests.models import adamw, attached, bare_bert, lora_llama, loss_of, sequences, train

R = 8
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def random_examples(count, *, vocabulary, seed=0):
    """Return token lists of many lengths; some repeat a few tokens, some hardly any."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        high = 3 if index % 3 == 0 else vocabulary
        examples.append(torch.randint(1, high, (length,), generator=generator).tolist())
    return examples


def padded(examples, length, side):
    tokens = torch.zeros(len(examples), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, example in enumerate(examples):
        part = slice(0, len(example)) if side == "right" else slice(length - len(example), length)
        tokens[row, part], mask[row, part] = torch.tensor(example), 1
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions_of(mask)}


def positions_of(mask):
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def with_full_adapter(model):
    """Fill `lora_B`, so that every component adds something."""
    torch.manual_seed(3)
    for layer in find_lora_layers(model, None):
        layer.lora_B.data.normal_(std=0.1)
    return model


def lora_bert():
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear")
    return with_full_adapter(get_peft_model(bare_bert(layers=2), config))


def llama():
    return with_full_adapter(lora_llama(r=R))


def adaptive_on(model, vocabulary):
    """Install the hooks, with thresholds from a sample of other examples."""
    adaptive = InputAdaptiveRanks(model)
    adaptive.observing = True
    model.train()
    model(**padded(random_examples(64, vocabulary=vocabulary, seed=1), 12, "right"))
    adaptive.after_event(lambda: None)
    adaptive.observing = False
    model.eval()
    return adaptive


@pytest.fixture(params=["encoder", "decoder"])
def model_and_adaptive(request):
    model, vocabulary = (lora_bert(), 64) if request.param == "encoder" else (llama(), 16)
    return model, adaptive_on(model, vocabulary), random_examples(9, vocabulary=vocabulary)


@torch.no_grad()
def output_of(model, batch):
    return model(**batch)[0]


def test_examples_use_at_least_three_ranks_and_the_output_differs_with_it_off(model_and_adaptive):
    model, adaptive, examples = model_and_adaptive
    batch = padded(examples, 12, "right")
    assert len(adaptive.fractions(**batch).unique()) >= 3
    on = output_of(model, batch)
    with adaptive.disabled():
        off = output_of(model, batch)
    assert (on - off).abs().max() > 1e-2
    assert torch.equal(on, output_of(model, batch))


def test_switched_off_or_closed_it_is_the_plain_adapter_bit_for_bit(model_and_adaptive):
    model, adaptive, examples = model_and_adaptive
    batch = padded(examples, 12, "right")
    with adaptive.disabled():
        off = output_of(model, batch)
    adaptive.close()
    plain = output_of(model, batch)
    assert torch.equal(off, plain)
    adaptive.open()
    assert not torch.equal(output_of(model, batch), plain)


@pytest.mark.parametrize(("length", "side"), [(12, "left"), (19, "right")])
def test_an_example_gives_the_same_alone_in_a_batch_and_under_any_padding(
    model_and_adaptive, length, side
):
    model, adaptive, examples = model_and_adaptive
    together = padded(examples[::-1], length, side)
    outputs = output_of(model, together).flip(0)
    fractions = adaptive.fractions(**together).flip(0)
    seen = together["attention_mask"].flip(0).bool()
    for row, example in enumerate(examples):
        alone = padded([example], len(example), "right")
        own = fractions[row] if adaptive.whole else fractions[row][seen[row]]
        assert torch.equal(own, adaptive.fractions(**alone)[0])
        torch.testing.assert_close(outputs[row][seen[row]], output_of(model, alone)[0], **CLOSE)


def test_an_encoders_example_gets_exactly_the_adapter_cut_to_its_first_components():
    model = lora_bert()
    adaptive = adaptive_on(model, 64)
    examples = random_examples(12, vocabulary=64)
    batch = padded(examples, 12, "right")
    outputs, fractions = output_of(model, batch), adaptive.fractions(**batch)
    for row, fraction in enumerate(fractions.tolist()):
        cut = truncated_bert(model, round(R * fraction))
        single = {name: values[row : row + 1] for name, values in batch.items()}
        torch.testing.assert_close(outputs[row : row + 1], output_of(cut, single), **CLOSE)


def truncated_bert(model, k):
    """Build an adapter of rank k from the first k rows and columns, without any hook of ours."""
    config = LoraConfig(r=k, lora_alpha=2 * k, target_modules="all-linear")
    cut = get_peft_model(bare_bert(layers=2), config)
    pairs = zip(find_lora_layers(cut, None), find_lora_layers(model, None), strict=True)
    for small, large in pairs:
        small.lora_A.data.copy_(large.lora_A[:k])
        small.lora_B.data.copy_(large.lora_B[:, :k])
    return cut.eval()


def test_a_decoders_token_gets_the_first_components_that_its_own_prefix_asks_for():
    model = with_full_adapter(lora_llama(r=R, target_modules=["down_proj"]))
    adaptive = adaptive_on(model, 16)
    layer = find_lora_layers(model, None)[-1]
    seen = []
    handle = layer.module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    batch = padded(random_examples(5, vocabulary=16), 12, "right")
    output_of(model, batch)
    handle.remove()
    ((inputs, outputs),) = seen
    table = model.get_base_model().get_input_embeddings().weight.double()
    with torch.no_grad():
        for row, column in batch["attention_mask"].nonzero().tolist():
            prefix = table[batch["input_ids"][row, : column + 1]]
            quarter = 3
            if column > 0:
                complexity = float(prefix.var(dim=0).mean())
                quarter = sum(complexity >= bound for bound in adaptive.thresholds)
            k, token = components_used(R)[quarter], inputs[row, column]
            added = layer.lora_B[:, :k] @ (layer.lora_A[:k] @ token) * layer.scaling
            expected = layer.module.base_layer(token) + added
            torch.testing.assert_close(outputs[row, column], expected, **CLOSE)


def test_what_comes_later_never_changes_a_decoders_output():
    model = llama()
    adaptive_on(model, 16)
    example = random_examples(1, vocabulary=16)[0] + [7, 2, 2, 9]
    whole = output_of(model, padded([example], len(example), "right"))[0]
    for end in range(1, len(example)):
        part = output_of(model, padded([example[:end]], end, "right"))[0]
        torch.testing.assert_close(whole[:end], part, **CLOSE)


@pytest.mark.parametrize("training", [False, True])
def test_generating_with_a_cache_equals_forward_passes_without(training):
    model = llama()
    adaptive = adaptive_on(model, 16)
    model.train(training)
    examples = random_examples(6, vocabulary=16)
    batch = padded(examples, 11, "left")
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(
        **given, max_new_tokens=14, output_logits=True, return_dict_in_generate=True, **settings
    )
    mask = torch.cat([batch["attention_mask"], torch.ones(6, 14, dtype=torch.int64)], dim=1)
    whole = {"input_ids": generated.sequences, "attention_mask": mask}
    assert len(adaptive.fractions(**whole)[:, 11:].unique()) >= 3
    logits = output_of(model, {**whole, "position_ids": positions_of(mask)})[:, 10:-1]
    torch.testing.assert_close(torch.stack(generated.logits, dim=1), logits, **CLOSE)
    assert torch.equal(generated.sequences[:, 11:], logits.argmax(dim=-1))
    with adaptive.disabled():
        off = model.generate(
            **given, max_new_tokens=14, output_logits=True, return_dict_in_generate=True, **settings
        )
    assert (torch.stack(off.logits) - torch.stack(generated.logits)).abs().max() > 1e-2
    without = model.generate(**given, max_new_tokens=14, use_cache=False, **settings)
    assert torch.equal(without, generated.sequences)


def test_a_run_resumed_from_disk_ends_bit_for_bit_the_same(tmp_path):
    """From before the first thresholds, and from between two events."""
    steps = 24

    def start():
        model = lora_llama(r=R)
        optimizer = adamw(model)
        config = {"total_steps": steps, "hysteresis": 0, "input_adaptive": True}
        return model, optimizer, attached(model, optimizer, **config)

    model, optimizer, dynamic = start()
    kept = {}

    def keep(step):
        if step in (2, 7):
            save_state(tmp_path / str(step), dynamic.state_dict())
            kept[step] = copy.deepcopy((lora_weights(model), optimizer.state_dict()))

    for step in (2, 7):
        (tmp_path / str(step)).mkdir()
    train(model, optimizer, dynamic, steps, after=keep)
    for killed_at, (weights, moments) in kept.items():
        again, optimizer, resumed = start()
        resumed.load_state_dict(load_state(tmp_path / str(killed_at)))
        again.load_state_dict(weights, strict=False)
        optimizer.load_state_dict(moments)
        rest = itertools.islice(sequences(), killed_at, None)
        train(again, optimizer, resumed, steps - killed_at, batches=rest)
        assert all(torch.equal(w, lora_weights(again)[n]) for n, w in lora_weights(model).items())
        assert dynamic.input_adaptive.thresholds == resumed.input_adaptive.thresholds != ()
        assert dynamic.history == resumed.history


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_thresholds_and_the_order_of_components_change_in_step_at_events_only(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, total_steps=24, hysteresis=0, input_adaptive=True)
    batches, seen = sequences(), [()]
    for step in range(1, 25):
        loss_of(tiny_llama, next(batches)).backward()
        dynamic.observe()
        optimizer.step()
        assert dynamic.input_adaptive.thresholds == seen[-1]
        dynamic.step()
        optimizer.zero_grad()
        if any(event.step == step for event in dynamic.history):
            seen.append(dynamic.input_adaptive.thresholds)
        assert dynamic.parameters <= dynamic.budget
        assert dynamic.peak_parameters <= dynamic.budget
    assert len(set(seen)) == 1 + len(dynamic.history) >= 6


def test_what_is_evaluated_between_steps_changes_no_threshold():
    found = []
    for way in (None, "eval mode", "no gradients"):
        model = lora_llama().train()
        optimizer = adamw(model)
        dynamic = attached(model, optimizer, total_steps=12, input_adaptive=True)

        def look(_, model=model, way=way):
            if way is not None:
                model.train(way != "eval mode")
                with torch.set_grad_enabled(way != "no gradients"):
                    loss_of(model, next(sequences(batch=16, length=20, seed=7)))
                model.train()

        train(model, optimizer, dynamic, 12, after=look)
        found.append((dynamic.input_adaptive.thresholds, dynamic.ranks))
    assert found[0] == found[1] == found[2]
    assert found[0][0]


def test_components_are_ordered_by_the_strength_that_the_input_gives_them(tiny_llama):
    optimizer = adamw(tiny_llama)
    dynamic = attached(tiny_llama, optimizer, total_steps=24, hysteresis=0, input_adaptive=True)
    train(tiny_llama, optimizer, dynamic, 11)
    tokens = {name: stats.tokens for name, stats in dynamic._analyzer.stats().items()}
    batch = {"input_ids": next(sequences(seed=4))}
    with dynamic.input_adaptive.disabled():
        before = output_of(tiny_llama.eval(), batch)
        dynamic.apply(RankPlan(step=11, ranks={}))
        torch.testing.assert_close(output_of(tiny_llama, batch), before, **CLOSE)
    for layer in dynamic._layers:
        # Oracle: what each component adds to the output of each token, one by one.
        parts = tokens[layer.name] @ layer.lora_A.T
        power = parts.square().mean(dim=0).sqrt() * layer.lora_B.norm(dim=0)
        assert (power.diff() <= 1e-5 * power[0]).all(), layer.name


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_gradients_of_training_without(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = llama()
        adaptive_on(model, 16)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            settings = {"use_reentrant": reentrant}
            model.activation_checkpointing_enable(settings)
        for seed in (4, 5):  # two micro-batches, and an evaluation before each backward pass
            loss = loss_of(model, next(sequences(seed=seed)))
            with torch.no_grad():
                loss_of(model, next(sequences(seed=9, batch=3)))
            loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "lora_" in n])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
def test_two_forwards_before_the_backward_pass_of_checkpointing_are_refused():
    model = llama()
    adaptive_on(model, 16)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    losses = [loss_of(model, next(sequences(seed=seed))) for seed in (4, 5)]
    with pytest.raises(EngineError, match=r"got 2 forwards: run those .* `torch.no_grad\(\)`"):
        sum(losses).backward()
