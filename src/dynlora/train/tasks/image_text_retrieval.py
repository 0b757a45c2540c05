"""Image-text retrieval: two towers that embed an image and its captions alike.

A training batch has one caption per image, another one in each epoch, so that captions of the same
image are never negatives. Metrics compare all validation images with all their captions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from dynlora.adapter_files.base_models import Source
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import read_captions, refuse_rows
from dynlora.train.data.splits import RawSplit
from dynlora.train.methods.full_modules import new_projections, unread_outputs
from dynlora.train.pretrained import check_length, load_model, load_tokenizer
from dynlora.train.task import Predictor, Split, Task, row_logits
from dynlora.train.tasks.image_classification import (
    PROBES,
    check_images,
    content,
    load_image_processor,
    pixel_inputs,
    reading_an_image,
)
from dynlora.train.tasks.metrics import retrieval_metrics
from dynlora.train.tasks.sequence import rounded, tokenize
from dynlora.train.trainer import EpochSampler, JobTrainer, make_job_trainer

BEST = 5  # captions per predicted image
PairLoss = Callable[[Tensor], Float[Tensor, ""]]
"""Returns the loss per row of logits ``(n, n)`` whose diagonal holds the right pairs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processors:
    """The processors of both towers."""

    image: Any
    text: PreTrainedTokenizerBase
    max_length: int  # maximum tokens per caption

    def save_pretrained(self, folder: Path) -> None:
        """Save both beside the model."""
        self.image.save_pretrained(folder)
        self.text.save_pretrained(folder)

    def collate(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `pixel_values` per image, all captions of the batch, and their `counts`."""
        # Models whose tokenizers return no attention mask, such as SigLIP, also read the padding.
        if "attention_mask" in self.text.model_input_names:
            pad = DataCollatorWithPadding(self.text)
        else:
            pad = DataCollatorWithPadding(self.text, "max_length", self.max_length)
        captions = pad([{"input_ids": ids} for row in rows for ids in row["captions"]])
        others = [{key: row[key] for key in row if key != "captions"} for row in rows]
        counts = torch.tensor([len(row["captions"]) for row in rows])
        return {**default_data_collator(others), **captions, "counts": counts}


@dataclass(frozen=True)
class OneCaptionEach(Dataset[dict[str, Any]]):
    """Training rows with one caption each, which depends only on epoch and row."""

    rows: Any
    sampler: EpochSampler

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Return a row with its caption of the sampler's epoch."""
        row: dict[str, Any] = self.rows[place]
        captions = row["captions"]
        return row | {"captions": [captions[(self.sampler.epoch + place) % len(captions)]]}


def _load_processor(source: Source, config: DataConfig) -> Processors:
    return Processors(
        image=load_image_processor(source, config),
        text=load_tokenizer(source, config.max_length),
        max_length=config.max_length,
    )


def _read_split(
    split: RawSplit, config: DataConfig, processor: Processors, _num_labels: int | None
) -> Split:
    inputs, _, cut = _encode(split, config, processor)
    first: dict[Any, int] = {}
    images = [content(value.as_py()) for value in split.table[config.image]]
    places = [first.setdefault(image, row) for row, image in enumerate(images)]
    refuse_rows(
        split,
        f"column {config.image!r} must hold another image in every row, because the captions of "
        "other rows count as wrong",
        [(row, split.row_numbers[place]) for row, place in enumerate(places) if place != row],
        "Collect all captions of an image in one row, as a list.",
        show=lambda row: f"the image of row {row}",
    )
    return Split(inputs=inputs, cut=cut, num_labels=None)


def _encode(
    split: RawSplit, config: DataConfig, processor: Processors
) -> tuple[Any, list[list[str]], int]:
    """Return the `datasets.Dataset` of inputs, the captions, and the rows with truncated ones."""
    captions = read_captions(split, "data.text", config.text)
    check_images(split, config.image)
    encoded = [tokenize(row, None, processor.text, processor.max_length) for row in captions]
    tokens = [columns["input_ids"] for columns, _ in encoded]
    refuse_rows(
        split,
        f"column {config.text!r} must hold captions of which the tokenizer makes tokens",
        [(row, captions[row]) for row, each in enumerate(tokens) if not all(each)],
        "Remove these captions or fill them in.",
    )
    more = {"captions": pa.array(tokens), "labels": pa.array(range(len(tokens)))}
    inputs = pixel_inputs(split, config, processor.image, more)
    return inputs, captions, sum(count > 0 for _, count in encoded)


def _load_model(source: Source, _num_labels: int | None, processor: Processors) -> Any:
    """Load the model, and compare its logits with those from its embeddings."""
    model = load_model(AutoModel, source)
    pixels = processor.image([Image.new("RGB", PROBES[0])], return_tensors="pt")["pixel_values"]
    captions = [processor.text("a")["input_ids"], processor.text("a b")["input_ids"]]
    batch = processor.collate([{"pixel_values": pixels[0], "captions": captions}])
    batch = {key: value.to(model.device) for key, value in batch.items()}
    counts, embed = batch.pop("counts"), embed_pairs(model)
    advice = (
        "Use a model with a tower for images and one for texts, such as CLIP, SigLIP or a "
        "VisionTextDualEncoderModel, or set `size` and `crop_size` in its preprocessor_config.json."
    )
    with reading_an_image(model, source, advice):
        wanted = model.eval()(**batch).logits_per_image.float()
        embedded: Any = embed(**batch, counts=counts).logits
        images, texts = embedded[0].split([1, len(captions)])
        torch.testing.assert_close(images @ texts.T, wanted, rtol=0.02, atol=0.02)
    model.forward = embed
    return model


def embed_pairs(model: Any) -> Callable[..., SequenceClassifierOutput]:
    """Return a forward whose `logits` ``(images, 1 + captions, size + 1)`` are embeddings.

    The product of an image's vector, which comes first, with a caption's is the model's logit: the
    image's vector contains scale and bias. Missing captions are zero; the last entry of others is
    1.
    """
    forward = model.forward

    def embed(
        pixel_values: Tensor,
        input_ids: Tensor,
        counts: Tensor,
        attention_mask: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        parameters = dict(model.named_parameters(recurse=False))  # a sharded model has new ones
        found = forward(pixel_values=pixel_values, input_ids=input_ids, **mask)
        scaled = found.image_embeds.float() * parameters["logit_scale"].float().exp()
        bias = parameters.get("logit_bias", scaled.new_zeros(1)).float()
        images = torch.cat([scaled, bias.expand(len(scaled), 1)], dim=1)
        texts = nn.functional.pad(found.text_embeds.float(), (0, 1), value=1.0)
        rows = list(torch.split(texts, counts.tolist()))
        captions = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return SequenceClassifierOutput(logits=torch.cat([images[:, None], captions], dim=1))

    return embed


def softmax_loss(logits: Tensor) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of CLIP's loss, over rows and over columns."""
    pairs = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)) / 2


def sigmoid_loss(logits: Tensor) -> Float[Tensor, ""]:
    """Return SigLIP's binary cross-entropy of all pairs, per row."""
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -logsigmoid(signs * logits).sum() / len(logits)


def summed_contrastive(
    embedded: Float[Tensor, "images entries size"], labels: Tensor, *, pair_loss: PairLoss
) -> Float[Tensor, ""]:
    """Return the loss of all rows as one batch; with several captions, the mean over them."""
    images, captions = embedded[:, 0], embedded[:, 1:]
    counts = (captions[..., -1] == 1).sum(dim=1)
    rows = torch.arange(len(embedded), device=embedded.device)
    losses = [
        pair_loss(images @ captions[rows, place % counts].T) for place in range(captions.shape[1])
    ]
    return torch.stack(losses).mean() * len(labels)


def _make_trainer(values: dict[str, Any], processor: Processors, **parts: Any) -> JobTrainer:
    has_bias = any(name.endswith("logit_bias") for name, _ in parts["model"].named_parameters())
    pair_loss = sigmoid_loss if has_bias else softmax_loss
    parts |= {"train_dataset": OneCaptionEach(parts["train_dataset"], parts["sampler"])}
    return make_job_trainer(
        values | {"remove_unused_columns": False},  # the forward reads no `captions`
        processor,
        loss=partial(summed_contrastive, pair_loss=pair_loss),
        metrics=retrieval_metrics,
        collate=lambda processor: processor.collate,
        **parts,
    )


def _predict(predictor: Predictor, split: RawSplit, config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield per image the `BEST` captions of all rows, and their cosine similarities."""
    processor: Processors = predictor.processor
    inputs, captions, _ = _encode(split, config, processor)
    rows = list(row_logits(predictor, inputs.remove_columns("labels"), processor.collate))
    texts = torch.cat([row[1 : 1 + len(own), :-1] for row, own in zip(rows, captions, strict=True)])
    spoken = [caption for row in captions for caption in row]
    for row in rows:
        similarities = texts @ normalize(row[0, :-1], dim=0)
        best = similarities.topk(min(BEST, len(spoken)))
        yield {
            "prediction": [spoken[place] for place in best.indices.tolist()],
            "similarities": rounded(best.values),
        }


IMAGE_TEXT_RETRIEVAL = Task(
    peft_type=None,
    head=new_projections,
    unread=unread_outputs,
    load_processor=_load_processor,
    read_split=_read_split,
    load_model=_load_model,
    check_model=check_length,
    make_trainer=_make_trainer,
    predict=_predict,
)
"""The logit scale is trained only with `method: full`: no PEFT adapter can contain it."""
