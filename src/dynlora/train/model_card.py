"""The model card of a trained adapter: the facts of its run into the README.md beside it."""

import shutil
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard
from peft.tuners.lora import LoraLayer

from dynlora.files.whole import write_text
from dynlora.report.wording import metric_text
from dynlora.train.build import Job
from dynlora.train.task import no_head

TEMPLATE = """# {name}

A LoRA adapter of `{base}`, in PEFT's format, trained with dynlora.

| | |
| --- | --- |
{facts}

| validation metric | before training | this adapter |
| --- | --- | --- |
{metrics}

{picture}## Load

```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained("{base}"{head})
model = PeftModel.from_pretrained(base, "ADAPTER")  # this folder or repository
```
"""
SERVERS = """
vLLM and llama.cpp need one rank in all layers:

```bash
dynlora export ADAPTER --format uniform --output served
vllm serve "{base}" --enable-lora --max-lora-rank {rank} --lora-modules {name}=served
python convert_lora_to_gguf.py served --base "{base}" --outfile served.gguf  # of llama.cpp
llama-server --model base.gguf --lora served.gguf
```
"""


def write_card(job: Job, report: Mapping[str, Any]) -> None:
    """Replace the text of PEFT's card, keeping its metadata, and copy the picture of the ranks."""
    config, data, folder, task = job.config, job.inputs.data, job.folder.adapter, job.inputs.task
    drawn, model = job.folder.heatmap.is_file(), job.prepared.model
    if drawn:
        shutil.copyfile(job.folder.heatmap, folder / "ranks.png")
    before = {name: metric_text(value) for name, value in report["before"].items()}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    times = 1 if job.prepared.first is None else 2  # a difference has the initial factors too
    ranks = [times * rank for layer in layers for rank in layer.r.values()]
    source = config.data.name if config.data.path is None else "local files"
    facts = {
        "task": config.task,
        "data": f"{source}, {len(data.train):,} training rows",
        "classes": ", ".join(data.class_names or ()),
        "method": f"{config.method}, {job.trainer.state.global_step} steps",
        "ranks": f"{min(ranks)} to {max(ranks)}, {times * report['parameters']:,} parameters",
    }
    num_labels = None if task.head is no_head else data.num_labels
    values = {
        "name": job.folder.root.absolute().name,
        "base": job.inputs.source.label,
        "facts": "\n".join(f"| {what} | {value} |" for what, value in facts.items() if value),
        "metrics": "\n".join(
            f"| {name} | {before.get(name, '')} | {metric_text(value)} |"
            for name, value in report["after"].items()
        ),
        "picture": "![Rank of each layer by step](ranks.png)\n\n" if drawn else "",
        "kind": type(model.get_base_model()).__name__,
        "head": "" if num_labels is None else f", num_labels={num_labels}",
        "rank": max(8, 1 << (max(ranks) - 1).bit_length()),  # as vLLM's choices
    }
    servers = SERVERS if task.peft_type == "CAUSAL_LM" else ""
    card = ModelCard.load(folder / "README.md")
    card.text = (TEMPLATE + servers).format(**values)
    card.data.tags = sorted({*(card.data.tags or ()), "dynlora"})
    if config.data.path is None:
        card.data.datasets = [config.data.name]
    write_text(folder / "README.md", str(card))
