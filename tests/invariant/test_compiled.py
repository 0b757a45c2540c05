"""torch.compile: tensors have the live rank, and an event compiles each part once at most."""

import copy
import gc
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch._dynamo.utils import counters

from dynlora.engines.compiled import follow_ranks
from dynlora.errors import ConfigError
from dynlora.integrations.checkpoint import load_state, save_state
from dynlora.types import RankPlan
from tests.adapters import Convolutions
from tests.layer_kinds import CASES
from tests.lora_layers import lora_chain
from tests.models import adamw, attached, bare_llama, loss_of, sequences, train

STEPS, KILLED = 60, 20
SETTINGS = {
    "importance": "random",
    "total_steps": STEPS,
    "hysteresis": 0,
    "shrink_tolerance": 1,
    "layer_weights": True,
    "events": 4,
    "fused": False,
}


@contextmanager
def new_compiler():
    """Forget all compiled code, and allow one compilation of each region."""
    torch._dynamo.reset()
    counters.clear()
    limits = torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1)
    with limits, torch.compiler.config.patch(dynamic_sources=""):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    with new_compiler():
        yield


def small_llama():
    """Return one block: tracing takes most of the time here."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return get_peft_model(bare_llama(layers=1), lora).train()


def attached_to_compiled(model):
    """Return a compiled model, its optimizer and a controller."""
    optimizer = adamw(model)
    called = torch.compile(model, backend="eager", fullgraph=True)
    return called, optimizer, attached(called, optimizer, **SETTINGS)


def graphs_so_far():
    return counters["stats"]["unique_graphs"]


def compilations(graphs, events):
    """Return the numbers of graphs compiled after each event, all in one step or in none."""
    new = [after - before for before, after in itertools.pairwise(graphs)]
    ends = [*(event - 1 for event in events), len(new)]
    spans = [new[start:end] for start, end in itertools.pairwise(ends)]
    assert all(sum(map(bool, span)) <= 1 for span in spans)
    return [sum(span) for span in spans]


@pytest.fixture(scope="module")
def run():
    with new_compiler():  # fixtures of a module come before those of its tests
        return compiled_run()


def compiled_run():
    """Train; return all of it, with a checkpoint, the numbers of graphs by step, and outputs."""
    model = small_llama()
    called, optimizer, dynamic = attached_to_compiled(model)
    graphs, kept = [], []

    def after(step):
        graphs.append(graphs_so_far())
        if step == KILLED:
            parts = dynamic.state_dict(), model.state_dict(), optimizer.state_dict()
            kept.extend(copy.deepcopy(parts))

    train(called, optimizer, dynamic, STEPS, after=after)
    with torch.no_grad():
        outputs = called.eval()(input_ids=next(sequences(seed=5))).logits
    return SimpleNamespace(
        model=model, optimizer=optimizer, dynamic=dynamic, kept=kept, graphs=graphs, outputs=outputs
    )


def assert_equal_to_the_last_bit(run, model, dynamic):
    assert dynamic.history == run.dynamic.history
    for name, weight in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], weight), name


def test_each_event_compiles_the_model_once_and_no_other_step_does(run):
    events = run.dynamic.history
    moves = [any(x.rank_before != x.rank_after for x in e.layers.values()) for e in events]
    assert sum(moves) >= 3
    assert len({tuple(x.weight for x in event.layers.values()) for event in events}) > 2
    assert run.graphs[events[0].step - 1] == 1  # one graph for the whole model, none for a hook
    assert compilations(run.graphs, [event.step for event in events]) == moves


def test_weights_gradients_and_moments_have_the_live_rank(run):
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == run.dynamic.parameters <= run.dynamic.budget
    for parameter in trained:
        assert run.optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_a_compiled_run_is_the_run_that_is_not_compiled(run):
    model = small_llama()
    optimizer = adamw(model)
    control = attached(model, optimizer, **SETTINGS)
    train(model, optimizer, control, STEPS)
    assert_equal_to_the_last_bit(run, model, control)


def test_the_adapter_of_a_compiled_run_loads_in_plain_peft(run, tmp_path):
    assert len(set(run.dynamic.ranks.values())) > 1
    run.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bare_llama(layers=1), tmp_path)
    with torch.no_grad():
        outputs = loaded.eval()(input_ids=next(sequences(seed=5))).logits
    torch.testing.assert_close(run.outputs, outputs, rtol=0, atol=1e-5)


def test_a_compiled_run_that_was_killed_ends_bit_for_bit_the_same(run, tmp_path):
    state, saved_weights, saved_optimizer = run.kept
    save_state(tmp_path, state)
    model = small_llama()
    called, optimizer, dynamic = attached_to_compiled(model)
    dynamic.load_state_dict(load_state(tmp_path))
    model.load_state_dict(saved_weights)
    optimizer.load_state_dict(copy.deepcopy(saved_optimizer))
    batches = itertools.islice(sequences(), KILLED, None)
    train(called, optimizer, dynamic, STEPS - KILLED, batches)
    assert_equal_to_the_last_bit(run, model, dynamic)


def vectors():
    while True:
        yield torch.randn(4, 8, dtype=torch.float64)


def distance(model, x):
    return (model(x) - x.roll(1, dims=1)).square().mean()


def moved_chain(*, compiled=""):
    """Train five layers, with rank 1 in another pair every third step; return graphs by step."""
    model = lora_chain(*[8] * 6, r=2).train()
    called = model
    if compiled == "model":
        called = torch.compile(model, backend="eager", fullgraph=True)
    if compiled == "blocks":
        for layer in model.base_model.model:
            layer.compile(backend="eager", fullgraph=True)
    optimizer = adamw(model)
    dynamic = attached(called, optimizer, total_steps=1000, fused=False)
    torch.manual_seed(0)
    graphs, batches = [], vectors()
    for pair in itertools.combinations(dynamic.ranks, 2):
        ranks = {name: 1 if name in pair else 2 for name in dynamic.ranks}
        dynamic.apply(RankPlan(step=dynamic._step, ranks=ranks))
        for _ in range(3):
            train(called, optimizer, dynamic, 1, batches, loss=distance)
            graphs.append(graphs_so_far())
    return SimpleNamespace(model=model, dynamic=dynamic, graphs=graphs)


def test_more_changes_than_torch_would_compile_for_are_compiled():
    run, control = moved_chain(compiled="model"), moved_chain()
    assert_equal_to_the_last_bit(run, control.model, control.dynamic)
    assert run.graphs[2::3] == list(range(1, 11))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch hides it, if it is no error
def test_blocks_compiled_one_by_one_share_code_for_all_ranks_above_one():
    run, control = moved_chain(compiled="blocks"), moved_chain()
    assert_equal_to_the_last_bit(run, control.model, control.dynamic)
    # Rank 1 or more, and inputs with gradients or, in the first layer, without.
    assert run.graphs[-1] == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_no_kind_of_layer_is_compiled_again_for_ranks_above_one():
    lora = LoraConfig(r=4, target_modules=["embed", "conv2", "head"])
    model = get_peft_model(Convolutions(), lora).train()
    for layer in (model.model.embed, model.model.conv2, model.model.head):
        layer.compile(backend="aot_eager", fullgraph=True)
    dynamic = attached(model, adamw(model), total_steps=10)
    dynamic.freeze()
    tokens = torch.arange(32).reshape(4, 8) % 11
    for ranks in ((4, 4, 4), (2, 5, 2), (5, 4, 2)):
        dynamic.apply(RankPlan(step=1, ranks=dict(zip(dynamic.ranks, ranks, strict=True))))
        gradients = []
        for stance in ("default", "force_eager"):
            model.zero_grad()
            with torch.compiler.set_stance(stance):
                model(tokens).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        for compiled, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(compiled, plain)
        assert graphs_so_far() == 3


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_experts_are_compiled_once_for_each_change_of_their_ranks():
    model = CASES["Experts"].model()
    model.get_base_model().model.layers[0].mlp.experts.compile(backend="eager", fullgraph=True)
    dynamic = attached(model, adamw(model), total_steps=10)
    dynamic.freeze()
    names = [name for name in dynamic.ranks if "layers.0.mlp" in name]
    assert len(names) == 2
    for changes, rank in enumerate((4, 3), 1):
        dynamic.apply(RankPlan(step=1, ranks=dict.fromkeys(names, rank)))
        gradients = []
        for stance in ("default", "default", "force_eager"):
            model.zero_grad()
            with torch.compiler.set_stance(stance):
                loss_of(model, next(sequences())).backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close(gradients[0], gradients[2])
        assert graphs_so_far() == changes


def test_the_limit_of_compilations_rises_with_the_compiled_parts():
    model = lora_chain(*[8] * 7)
    follow_ranks(model)
    assert torch._dynamo.config.recompile_limit == 1 + 8
    for layer in model.base_model.model:
        layer.compile(backend="eager")
    follow_ranks(model)
    assert torch._dynamo.config.recompile_limit == 1 + 8 + 6 * 8


def test_a_model_compiled_after_attaching_misses_one_sample():
    model = lora_chain(*[8] * 3).train()
    optimizer = adamw(model)
    dynamic = attached(model, optimizer, total_steps=100, fused=False)
    called = torch.compile(model, backend="eager", fullgraph=True)
    seen = []
    train(
        called,
        optimizer,
        dynamic,
        9,
        vectors(),
        after=lambda step: seen.append(bool(dynamic._analyzer.stats())),
        loss=distance,
    )
    assert seen == [False] * 8 + [True]


def test_input_adaptive_ranks_are_refused():
    called = torch.compile(small_llama(), backend="eager")
    with pytest.raises(ConfigError, match="must be false in compiled models"):
        attached(called, adamw(called), input_adaptive=True)


def stance():
    return torch._dynamo.eval_frame._stance.stance


def test_compiled_code_is_off_while_anybody_looks_and_on_again_after_the_last():
    runs = [attached_to_compiled(small_llama())[2] for _ in range(2)]
    assert stance() == "force_eager"
    runs[0].close()
    assert stance() == "force_eager"
    runs[1].close()
    assert stance() == "default"


def test_a_run_that_is_forgotten_leaves_the_compiler_on():
    parts = attached_to_compiled(small_llama())
    assert stance() == "force_eager"
    del parts
    gc.collect()
    assert stance() == "default"
