"""The model card of a trained adapter: the facts of its run into the README.md beside it."""

import shutil
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard

from dynlora.files.whole import write_text
from dynlora.report.wording import metric_text
from dynlora.train.build import Job
from dynlora.train.task import no_head

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`."""
SERVERS = """
With vLLM and llama.cpp, which need one rank in all layers:

```bash
dynlora export ADAPTER --format uniform --output served
vllm serve "{base}" --enable-lora --max-lora-rank {rank} --lora-modules {name}=served
python convert_lora_to_gguf.py served --base "{base}" --outfile served.gguf  # of llama.cpp
llama-server --model base.gguf --lora served.gguf
```
"""
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
{servers}"""


def write_card(job: Job, report: Mapping[str, Any]) -> None:
    """Replace the text of PEFT's card, keeping its metadata, and copy the picture of the ranks."""
    config, data, folder = job.config, job.inputs.data, job.folder.adapter
    picture = folder / "ranks.png"
    if job.folder.heatmap.is_file():
        shutil.copyfile(job.folder.heatmap, picture)
    ranks = report["final_ranks"].values() or [config.lora.r]
    rows = f"{len(data.train):,} training rows, {len(data.validation):,} validation rows"
    where = config.data.name or "local files"
    facts = {
        "task": f"`{config.task}`",
        "data": f"{where}: {rows}",
        "classes": ", ".join(data.class_names or ()),
        "method": f"`{config.method}`",
        "ranks": f"{min(ranks)} to {max(ranks)}, target modules `{config.lora.target_modules}`",
        "LoRA parameters": f"{report['parameters']:,}",
        "optimizer steps, seed": f"{job.trainer.state.global_step}, {config.training.seed}",
    }
    before, after = report["before"], report["after"]
    metrics = [f"| {m} | {metric_text(before.get(m))} | {metric_text(after[m])} |" for m in after]
    name, base, task = job.folder.root.absolute().name, job.inputs.source.label, job.inputs.task
    rank = min((each for each in RANKS if each >= max(ranks)), default=max(ranks))
    served = SERVERS.format(base=base, name=name, rank=rank)
    text = TEMPLATE.format(
        name=name,
        base=base,
        facts="\n".join(f"| {what} | {value} |" for what, value in facts.items() if value),
        metrics="\n".join(metrics),
        picture="![Rank of each layer by step](ranks.png)\n\n" if picture.is_file() else "",
        kind=type(job.prepared.model.get_base_model()).__name__,
        head="" if task.head is no_head else f", num_labels={data.num_labels}",
        servers=served if task.peft_type == "CAUSAL_LM" else "",
    )
    card = ModelCard.load(folder / "README.md")
    card.text = text
    card.data.tags = sorted({*(card.data.tags or ()), "dynlora"})
    if config.data.path is None:
        card.data.datasets = [config.data.name]
    write_text(folder / "README.md", str(card))
