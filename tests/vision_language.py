"""Tiny models that read an image and write text, for tests of `image_text_to_text`."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from tests.language import MAX_POSITIONS, save_language_tokenizer
from tests.pictures import SIDE

IMAGE = "<image>"
TILE = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>")
"""Further tokens that Idefics writes for an image."""
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
IMAGES = SIZES | {"image_size": SIDE, "patch_size": 8}
PROJECTOR = "model.multi_modal_projector"
CHAT = (
    "{% for message in messages %}<turn>{{ message['role'] + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
"""A template that writes each turn alike."""
KINDS = ("joined", "LLaVA", "Idefics")
"""`joined` is a LLaVA without a template and without the weights of its projector."""


def save_vision_language(folder: Path, kind: str = "joined") -> Path:
    """Save a random model of one of `KINDS` with its processor."""
    torch.manual_seed(0)
    save_language_tokenizer(folder, template=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE, *TILE]})
    text = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    place, template = tokenizer.convert_tokens_to_ids(IMAGE), None if kind == "joined" else CHAT
    model: PreTrainedModel
    if kind == "Idefics":
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(
                vision_config=IMAGES,
                text_config=text.to_dict(),
                image_token_id=place,
                scale_factor=1,
                pad_token_id=0,
            )
        )
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
        processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    else:
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**IMAGES),
            text_config=text,
            image_token_index=place,
            vision_feature_layer=-1,
        )
        model = LlavaForConditionalGeneration(config)
        processor = LlavaProcessor(
            CLIPImageProcessorPil(
                size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
            ),
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    weights = model.state_dict()
    if kind == "joined":
        weights = {name: w for name, w in weights.items() if not name.startswith(PROJECTOR)}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    return folder
