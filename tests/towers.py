"""Tiny models with a tower for images and one for captions, and pairs that they can learn."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from tests.jobs import HIDDEN, MAX_POSITIONS, SPECIAL, WORDS, save_tokenizer
from tests.pictures import SIDE, encoded

SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IMAGES = SIZES | {"image_size": SIDE, "patch_size": 8, "initializer_range": 0.3}
TEXTS = SIZES | {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.3,
}
COLOURS = WORDS[:3]
SIDES = ("old", "new")
"""Words for the left and the right half of a scene."""
THINGS = ("round", "square", "big", "small", "cat", "dog")


def dual_encoder() -> PreTrainedModel:
    """Return a ViT and a BERT with new projections."""
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**IMAGES), BertConfig(**TEXTS), projection_dim=HIDDEN
    )
    return VisionTextDualEncoderModel(config)


def clip() -> PreTrainedModel:
    """Return a CLIP whose end-of-text token is that of `save_tokenizer`."""
    config = CLIPConfig(text_config=TEXTS, vision_config=IMAGES, projection_dim=HIDDEN)
    return CLIPModel(config)


def siglip() -> PreTrainedModel:
    """Return a SigLIP, which reads padding."""
    return SiglipModel(SiglipConfig(text_config=TEXTS, vision_config=IMAGES))


TOWERS = {"dual encoder": dual_encoder, "CLIP": clip, "SigLIP": siglip}


def save_towers(folder: Path, kind: str = "dual encoder") -> Path:
    """Save a random model of one of `TOWERS`, its image processor and its tokenizer."""
    torch.manual_seed(0)
    TOWERS[kind]().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size).save_pretrained(folder)
    save_tokenizer(folder)
    if kind == "SigLIP":  # its tokenizers return no mask
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_input_names = ["input_ids"]
        tokenizer.save_pretrained(folder)
    return folder


def scene(kind: int, seed: int) -> Image.Image:
    """Return noise that is coloured in its left or right half, one of six kinds."""
    noise = np.random.default_rng(seed).integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
    half = slice(0, SIDE // 2) if kind < len(COLOURS) else slice(SIDE // 2, SIDE)
    noise[:, half, kind % len(COLOURS)] += 180
    return Image.fromarray(noise)


def caption_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows with a scene and one to three captions of its own, which all tell its kind."""
    rows = []
    for number in range(count):
        kind, others = number % 6, itertools.product(THINGS, THINGS)
        colour, side = COLOURS[kind % 3], SIDES[kind // 3]
        one, two = next(itertools.islice(others, number // 6, None))
        captions = [f"{colour} {side} {one} {two}", f"{one} {two} {side} {colour}"]
        captions.append(f"{two} {side} {one} {side} {colour}")
        image = encoded(scene(kind, 1000 * seed + number))
        rows.append({"image": image, "captions": captions[: 1 + number % 3]})
    return rows
