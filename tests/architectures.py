"""Tiny random models of many architectures, some with several towers, each with one batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

Batch = dict[str, Tensor]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
IMAGES = SIZES | {"image_size": 16, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXTS = SIZES | SPECIAL | {"vocab_size": 40, "max_position_embeddings": 32}
WORDS = range(3, 30)
IMAGE = 33
ROWS = 6


@dataclass(frozen=True)
class Case:
    """A base model, its batch, the parts whose ranks move, and the settings of its LoRA."""

    base: Callable[[], Any]
    batch: Callable[[], Batch]
    parts: tuple[str, ...]
    lora: Mapping[str, object] = field(default_factory=dict)

    def model(self) -> Any:
        """Return the base with a new adapter of rank 2."""
        torch.manual_seed(0)
        base = self.base()
        torch.manual_seed(1)
        config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": "all-linear"} | self.lora)
        if isinstance(base, diffusers.ModelMixin):
            base.add_adapter(config)
            return base.train()
        return get_peft_model(base, config).train()

    def loss(self, model: nn.Module) -> Tensor:
        """Return the loss of the batch; a diffusion model's target is part of the batch."""
        batch = self.batch()
        torch.manual_seed(2)
        if "target" not in batch:
            loss: Tensor = model(**batch).loss
            return loss
        target = batch.pop("target")
        return (model(**batch)[0] - target).square().mean()

    def reloaded(self, model: Any, folder: Path) -> Any:
        """Save the adapter, and return a fresh base with it, as PEFT or diffusers loads it."""
        torch.manual_seed(0)
        base = self.base()
        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder))
            return PeftModel.from_pretrained(base, folder).train()
        model.save_lora_adapter(folder)
        base.load_lora_adapter(folder, prefix=None, use_safetensors=True)
        return base.train()


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Return normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(length: int, *, rows: int = ROWS, seed: int = 1) -> Tensor:
    """Return random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS.start, WORDS.stop, (rows, length), generator=generator)


def masked(ids: Tensor) -> Batch:
    """Return tokens, of which the last row's second half is padding."""
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answered(ids: Tensor) -> Batch:
    """Return tokens whose images are no labels."""
    mask = torch.ones_like(ids)
    labels = torch.where(ids < WORDS.stop, ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def clip_batch() -> Batch:
    """Return pairs of images and texts, which end in CLIP's last token."""
    texts = torch.cat([words(6), torch.full((ROWS, 1), SPECIAL["eos_token_id"])], dim=1)
    return {**pixels(), "input_ids": texts, "return_loss": torch.tensor(True)}


def pixels() -> Batch:
    """Return images."""
    return {"pixel_values": noise(ROWS, 3, 16, 16)}


def siglip() -> nn.Module:
    """Return a SigLIP; nn.MultiheadAttention pools its images, and reads its own weights only."""
    return tf.SiglipModel(tf.SiglipConfig(text_config=TEXTS, vision_config=IMAGES))


def llava() -> nn.Module:
    """Return a CLIP tower, a projector and a Llama."""
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**IMAGES).to_dict(),
        text_config=tf.LlamaConfig(**TEXTS).to_dict(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return tf.LlavaForConditionalGeneration(config)


def seen(ids: Tensor) -> Tensor:
    """Put four tokens of an image into each row."""
    ids[:, 2:6] = IMAGE
    return ids


def qwen() -> nn.Module:
    """Return a tiny Qwen2-VL."""
    ropes = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(
        text_config=TEXTS | {"num_key_value_heads": 1, "rope_parameters": ropes},
        vision_config=vision | {"patch_size": 4, "spatial_merge_size": 2},
        image_token_id=IMAGE,
        video_token_id=34,
        vision_start_token_id=35,
        vision_end_token_id=36,
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def qwen_batch() -> Batch:
    """Return texts that begin with an image of 4 x 4 patches, merged two by two."""
    ids = seen(words(10))
    ids[:, 1], ids[:, 6] = 35, 36
    batch = answered(ids) | {"mm_token_type_ids": (ids == IMAGE).int()}
    grid = torch.tensor([[1, 4, 4]] * ROWS)
    return batch | {"pixel_values": noise(ROWS * 16, 3 * 2 * 4 * 4), "image_grid_thw": grid}


def whisper() -> nn.Module:
    """Return a tiny Whisper."""
    layers = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    both = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in layers.items()}
    config = tf.WhisperConfig(
        vocab_size=40, num_mel_bins=8, d_model=16, max_source_positions=10,
        max_target_positions=16, decoder_start_token_id=1, init_std=0.2, suppress_tokens=None,
        begin_suppress_tokens=None, **both, **SPECIAL,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    """Return a tiny speech recognizer, whose new head PEFT saves whole."""
    config = tf.Wav2Vec2Config(
        vocab_size=12, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(5, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_prob=0, layerdrop=0, ctc_zero_infinity=True, pad_token_id=0, **SIZES,
    )  # fmt: skip
    return tf.Wav2Vec2ForCTC(config)


def t5() -> nn.Module:
    """Return a tiny T5."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = tf.T5Config(vocab_size=40, decoder_start_token_id=0, pad_token_id=0, **sizes)
    return tf.T5ForConditionalGeneration(config)


def mamba() -> nn.Module:
    """Return a tiny Mamba."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2}
    config = tf.MambaConfig(vocab_size=40, use_mambapy=False, **sizes, **SPECIAL)
    return tf.MambaForCausalLM(config)


def unet() -> nn.Module:
    """Return a tiny UNet of Stable Diffusion."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def unet_batch() -> Batch:
    """Return noisy latents, their captions, and the noise."""
    states = {"sample": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 8)}
    return states | {"timestep": torch.arange(2), "target": noise(2, 4, 8, 8, seed=3)}


def flux() -> nn.Module:
    """Return a tiny Flux of one double and one single block."""
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip


def flux_batch() -> Batch:
    """Return noisy latents, their captions, and the noise; positions come first."""
    ids = {"img_ids": torch.ones(16, 3), "txt_ids": torch.zeros(5, 3)}
    states = {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 5, 16)}
    more = {"pooled_projections": noise(2, 8), "timestep": torch.arange(2.0)}
    return ids | states | more | {"target": noise(2, 16, 4, seed=3)}


SPEECH = ["q_proj", "k_proj", "v_proj", "out_proj", "projection", "output_dense"]
LATENT = ["to_v", "to_out.0", "net.0.proj"]
CASES = {
    "CLIP": Case(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(text_config=TEXTS, vision_config=IMAGES, projection_dim=16)
        ),
        clip_batch,
        ("text_model", "vision_model"),
    ),
    "SigLIP": Case(siglip, clip_batch, ("text_model", "vision_model")),
    "LLaVA": Case(
        llava,
        lambda: answered(seen(words(10))) | pixels(),
        ("vision_tower", "multi_modal_projector", "language_model"),
    ),
    "Qwen2-VL": Case(qwen, qwen_batch, ("visual", "language_model")),
    "Whisper": Case(
        whisper,
        lambda: {"input_features": noise(ROWS, 8, 20), "labels": words(7)},
        ("encoder", "decoder"),
    ),
    "wav2vec2": Case(
        wav2vec2,
        lambda: {"input_values": noise(ROWS, 400), "labels": words(4) % 12},
        ("feature_projection", "encoder"),
        {"target_modules": SPEECH, "modules_to_save": ["lm_head"]},
    ),
    "T5": Case(t5, lambda: masked(words(8)) | {"labels": words(6, seed=3)}, ("encoder", "decoder")),
    "Mamba": Case(
        mamba,
        lambda: {"input_ids": words(8), "labels": words(8)},
        ("backbone",),
        # PEFT refuses `out_proj`, and Mamba reads the weight of `dt_proj` itself.
        {"target_modules": ["in_proj", "x_proj"], "r": 4, "lora_alpha": 8},
    ),
    "a UNet": Case(
        unet,
        unet_batch,
        ("down_blocks", "mid_block", "up_blocks"),
        {"target_modules": [*LATENT, "conv1"]},
    ),
    "Flux": Case(
        flux,
        flux_batch,
        ("transformer_blocks", "single_transformer_blocks"),
        {"target_modules": [*LATENT, "to_q", "to_k", "add_q_proj", "add_v_proj", "proj_mlp"]},
    ),
}
