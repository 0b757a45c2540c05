"""Finished runs of tiny jobs, what stock libraries say about them, and runs that are stopped."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForSequenceClassification

from dynlora.cli.main import main
from dynlora.train.callbacks import ProgressBar
from tests.jobs import job_values, write_job


def run_job(folder, values, *options):
    """Train a job that writes to `folder/run`, and return that folder."""
    folder.mkdir(exist_ok=True)
    config = write_job(folder / "job.yaml", values)
    assert main(["train", str(config), "--quiet", *map(str, options)]) == 0
    return folder / "run"


def finish(folder, model, data, *options):
    """Train a classifier's job of 12 steps, and return its folder."""
    return run_job(folder, job_values(model, data, folder / "run"), *options)


def stock_model(run, model):
    """Load a run's model by PEFT and transformers alone."""
    if (run / "model").is_dir():
        return BertForSequenceClassification.from_pretrained(run / "model").eval()
    base = BertForSequenceClassification.from_pretrained(model)
    return PeftModel.from_pretrained(base, run / "adapter").eval()


def load_by_card(adapter):
    """Load an adapter and its base model by the code of its model card."""
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace('"ADAPTER"', repr(str(adapter))), names)
    return names["model"]


@torch.no_grad()
def logits_of(loaded, model, texts):
    """Return logits ``(texts, classes)`` of a loaded model, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [loaded(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows)


def stock_logits(run, model, texts):
    """Return logits ``(texts, classes)`` of a run by PEFT and transformers alone."""
    return logits_of(stock_model(run, model), model, texts)


def loss_on(data, loaded, model):
    """Return the mean cross-entropy of a loaded model over the validation rows."""
    rows = read_lines(data / "validation.jsonl")
    logits = logits_of(loaded, model, [row["text"] for row in rows])
    return float(cross_entropy(logits, torch.tensor([row["label"] for row in rows])))


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts(run):
    return read_json(run / "run.json")


def weights(run):
    full = run / "model" / "model.safetensors"
    return load_file(full if full.exists() else run / "adapter" / "adapter_model.safetensors")


def losses(run):
    """Return each step's training loss, and the validation losses among them."""
    lines = read_lines(run / "metrics.jsonl")
    return [(x["step"], x[key]) for x in lines for key in ("loss", "eval_loss") if key in x]


def assert_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same_end(one, other):
    """Assert that two runs end with the same bits, losses and facts."""
    assert_same_weights(one, other)
    assert losses(one) == losses(other)
    for name in ("ranks.jsonl", "adapter/adapter_config.json"):
        files = [run / name for run in (one, other)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes(), name
    runs = [facts(run) for run in (one, other)]
    for key in ("metrics_before", "metrics_after", "parameters", "final_ranks", "steps"):
        assert runs[0][key] == runs[1][key], key


@contextmanager
def stopped_at(step, error=SystemExit):
    """Let each run end with an error once a step is done."""

    def stop(self, args, state, *more, **named):
        if state.global_step == step:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", stop)
        yield


def assert_last_steps_resume_exactly(run):
    """Delete a run's last checkpoint, train on from the one before, and compare both ends."""
    whole = shutil.copytree(run, run.with_name(f"{run.name} whole"))
    last = max(path.name for path in (run / "checkpoints").iterdir())
    shutil.rmtree(run / "checkpoints" / last)
    assert main(["train", str(run / "config.yaml"), "--training.resume", "latest"]) == 0
    assert facts(run)["resumed_from_step"] < int(last.removeprefix("checkpoint-"))
    assert_same_end(whole, run)
