"""Join an image encoder and a language model into one model for captions and questions on images.

    python -m benchmarks.models.vision_language --vision FOLDER --text FOLDER --out FOLDER

FOLDER is a Hugging Face folder, or for `--text` also `package/folder` inside an installed package.
The result is a `LlavaForConditionalGeneration` for jobs with `task: image_text_to_text`. Its file
has no weights for the projector between both, which is therefore new and trained in full.

Reference:
    Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485.
"""

from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from benchmarks.models.two_towers import main

IMAGE = "<image>"
PROJECTOR = "model.multi_modal_projector."


def join(vision: str, text: str, out: Path) -> None:
    """Write the joint model without its projector, and its processor; prompts have no template."""
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.chat_template = None
    images, language = AutoModel.from_pretrained(vision), AutoModelForCausalLM.from_pretrained(text)
    language.resize_token_embeddings(len(tokenizer))
    settings = language.config.to_dict()
    settings.pop("quantization_config", None)  # of the file that the folder was made from
    config = LlavaConfig(
        vision_config=images.config,
        text_config=settings,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,  # the last block would learn nothing at LLaVA's -2
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(images.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith(PROJECTOR)}
    model.generation_config = language.generation_config
    model.save_pretrained(out, state_dict=weights)
    LlavaProcessor(
        AutoImageProcessor.from_pretrained(vision, backend="pil"),
        tokenizer,
        patch_size=images.config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # the class token, which the default strategy leaves out
    ).save_pretrained(out)


if __name__ == "__main__":
    main(__doc__, join)
