"""A tiny vision transformer on disk and pictures that it can tell apart."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

SIDE = 16
"""Of the model's input, in pixels."""


def save_vit(folder: Path, *, labels: int = 2) -> Path:
    """Save a random ViT of two blocks with dropout, and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE,
        patch_size=8,
        hidden_dropout_prob=0.1,
        initializer_range=0.3,
        num_labels=labels,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    return folder


def picture(label: int, seed: int) -> Image.Image:
    """Return noise that is reddish for label 1 and bluish for label 0."""
    noise = np.random.default_rng(seed).integers(0, 120, (12, 20, 3), dtype=np.uint8)
    noise[..., 0 if label else 2] += 100
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """Return a picture as a file holds it."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def picture_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with encoded pictures, every other one reddish."""
    return [
        {"image": encoded(picture(n % 2, 1000 * seed + n)), "label": n % 2} for n in range(count)
    ]


def save_class_folders(folder: Path, count: int, names: Sequence[str] = ("ants", "bees")) -> None:
    """Save pictures as JPEG files, in one folder a class."""
    for number in range(count):
        label = number % len(names)
        place = folder / names[label]
        place.mkdir(parents=True, exist_ok=True)
        picture(label, number).save(place / f"{number:03}.jpg")
