"""Image classification: one class per image, decoded per batch without augmentation.

Pixels are not cached, because they need more memory than the encoded files.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, default_data_collator

from dynlora.adapter_files.base_models import Source
from dynlora.errors import ConfigError
from dynlora.train.config import DataConfig
from dynlora.train.data.columns import check_column, refuse_rows
from dynlora.train.data.splits import RawSplit
from dynlora.train.methods.full_modules import head_modules
from dynlora.train.pretrained import load_model, loading
from dynlora.train.task import Predictor, Split, Task, row_logits
from dynlora.train.tasks.metrics import classification_metrics, summed_cross_entropy
from dynlora.train.tasks.sequence import describe_class, read_class_labels
from dynlora.train.trainer import make_job_trainer

PROBES = ((64, 48), (48, 64))
"""Sizes of two test images that an image processor must convert to the same shape."""
UNDECODABLE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""Errors of Pillow for missing, broken or far too large files and unknown formats."""
WHITE = (255, 255, 255, 255)


def pillow_processor(source: Source) -> Any:
    """Return the image processor of the model at `source` that works with Pillow.

    Pillow is always installed, and torchvision's pixels differ slightly from Pillow's.
    """
    return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        source.place, backend="pil", **source.options
    )


def load_image_processor(source: Source, _config: DataConfig) -> Any:
    """Return the image processor of the model at `source`; its pixels have one shape."""
    with loading("image processor", source):
        processor = pillow_processor(source)
    wide, high = (
        processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape
        for size in PROBES
    )
    if wide != high:
        raise ConfigError(
            f"the image processor of {source.place} must bring images of any size to one, got "
            f"pixels of shape {tuple(wide[1:])} and {tuple(high[1:])}: set `do_center_crop` and "
            "`crop_size` in its preprocessor_config.json, or a `size` of height and width."
        )
    return processor


def _read_split(
    split: RawSplit, config: DataConfig, processor: Any, num_labels: int | None
) -> Split:
    labels, count = read_class_labels(split, config.label, num_labels)
    check_images(split, config.image)
    inputs = pixel_inputs(split, config, processor, {"labels": pa.array(labels)})
    return Split(inputs=inputs, cut=0, num_labels=count)


def check_images(split: RawSplit, column: str) -> None:
    """Check that every row contains an image that decodes."""
    check_column(split, "data.image", column)
    rows = list(enumerate(split.table[column]))  # without decoding all bytes at once
    refuse_rows(
        split,
        f"column {column!r} must hold an image in every row: its bytes as JPEG, PNG or another "
        "format, or a path",
        [(row, value) for row, value in ((n, v.as_py()) for n, v in rows) if not _given(value)],
        "Remove these rows or fill them in.",
    )
    failed: list[tuple[int, str]] = []
    for row, value in rows:
        try:
            read_rgb(value.as_py(), split.folder)
        except UNDECODABLE as error:
            failed.append((row, f"{type(error).__name__}: {' '.join(str(error).split())}"))
    refuse_rows(
        split,
        f"column {column!r} must hold images that decode",
        failed,
        "Remove these rows or replace their images.",
        show=str,
    )


def _given(value: Any) -> bool:
    found = content(value)
    return isinstance(found, bytes | str) and len(found) > 0


def content(value: Any) -> Any:
    """Return the bytes or the path of an image, also from a record of both."""
    return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value


def read_rgb(value: Any, folder: Path) -> Image.Image:
    """Return an image, upright and as RGB, from bytes, a path in `folder`, or a record of both."""
    value = content(value)
    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else folder / value) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB on a white background."""
    if image.mode in ("F", "I"):  # of unknown value range
        raise ValueError("its pixels have 32 bits each: save it with 8 or 16")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return image.convert("RGB")


def pixel_inputs(
    split: RawSplit, config: DataConfig, processor: Any, more: dict[str, pa.Array]
) -> Any:
    """Return a `datasets.Dataset` that converts images to pixels on access."""

    def to_pixels(rows: dict[str, Any]) -> dict[str, Any]:
        if "pixel_values" not in rows:
            return rows
        images = [read_rgb(value, split.folder) for value in rows["pixel_values"]]
        return rows | {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    # Without the file's metadata, with which images would be decoded twice.
    inputs = datasets.Dataset(pa.table({"pixel_values": split.table[config.image], **more}))
    inputs.set_transform(to_pixels)
    return inputs


def _load_model(source: Source, num_labels: int | None, processor: Any) -> Any:
    """Load the model, and run it on the processor's pixels, whose size it may not accept."""
    model = load_model(AutoModelForImageClassification, source, num_labels=num_labels)
    pixels = processor(Image.new("RGB", PROBES[0]), return_tensors="pt")["pixel_values"]
    advice = "Set `size`, or `crop_size`, in its preprocessor_config.json as in training."
    with reading_an_image(model, source, advice):
        model.eval()(pixel_values=pixels.to(model.device))
    return model


@contextmanager
def reading_an_image(model: Any, source: Source, advice: str) -> Iterator[None]:
    """Translate the errors of a model whose processor does not fit, without gradients."""
    try:
        with torch.no_grad():
            yield
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, AssertionError) as e:
        raise ConfigError(
            f"the {type(model).__name__} of {source.label} must read what its processor makes of "
            f"an image, but fails: {' '.join(str(e).split()).rstrip('.')}. {advice}"
        ) from e


def _predict(predictor: Predictor, split: RawSplit, config: DataConfig) -> Iterator[dict[str, Any]]:
    check_images(split, config.image)
    inputs = pixel_inputs(split, config, predictor.processor, {})
    return map(describe_class, row_logits(predictor, inputs, default_data_collator))


IMAGE_CLASSIFICATION = Task(
    peft_type=None,
    head=head_modules,
    load_processor=load_image_processor,
    read_split=_read_split,
    load_model=_load_model,
    make_trainer=partial(
        make_job_trainer,
        loss=summed_cross_entropy,
        metrics=classification_metrics,
        collate=lambda _processor: default_data_collator,
    ),
    predict=_predict,
)
