"""EVA's directions: those of the inputs of the run's first batches, and nothing else changes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler

from dynlora.errors import ConfigError
from dynlora.train.methods.eva import begin_with_eva
from dynlora.train.methods.prepare import prepare
from tests.unit.train.test_methods import base, job

ROWS = 24


def trainer(rows: list[dict[str, torch.Tensor]], batch: int = 4) -> Any:
    """Return what EVA looks at of a Trainer."""

    def collate(chosen: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}

    return SimpleNamespace(
        train_dataset=rows,
        args=SimpleNamespace(train_batch_size=batch),
        sampler=SequentialSampler(rows),
        data_collator=collate,
    )


def rows(*, padding: int = 0, count: int = ROWS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        tokens = torch.randint(1, 20, (6,), generator=generator)
        row = torch.cat([tokens, torch.zeros(padding, dtype=torch.long)])
        mask = (torch.arange(6 + padding) < 6).long()
        found.append({"input_ids": row, "attention_mask": mask, "labels": torch.tensor(0)})
    return found


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_lora_a_spans_the_first_principal_directions_of_a_layers_inputs() -> None:
    model = prepare(base(), job("lora"), 100).model
    seen: list[torch.Tensor] = []
    query = model.get_base_model().bert.encoder.layer[0].attention.self.query
    given = rows()
    begin_with_eva(trainer(given, batch=ROWS), model)
    query.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    batch = trainer(given).data_collator(given)
    model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    inputs = seen[0].flatten(0, 1)
    directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)[2][:2]
    found = query.lora_A["default"].weight.detach()
    torch.testing.assert_close((found @ directions.T).abs(), torch.eye(2), atol=0.02, rtol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(2), atol=1e-5, rtol=0)


def test_only_lora_a_changes_and_no_random_number_is_drawn() -> None:
    model = prepare(base(), job("lora"), 100).model
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


def test_neither_labels_nor_padding_matter() -> None:
    found = []
    for padding, label in ((0, 0), (3, 1)):
        model = prepare(base(), job("lora"), 100).model
        given = [row | {"labels": torch.tensor(label)} for row in rows(padding=padding)]
        begin_with_eva(trainer(given), model)
        found.append({n: t for n, t in factors(model).items() if "lora_A" in n})
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-4, rtol=0)


def test_inputs_that_never_fill_the_rank_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model = prepare(base(), job("lora"), 100).model
    with pytest.raises(ConfigError, match=r"lora.r=2 directions .* settle in 300 batches"):
        begin_with_eva(trainer(rows(count=4), batch=1), model)  # one row a batch for the pooler
    assert capsys.readouterr().out == "", "PEFT prints; the result of a verb stands there"
