"""Single files of adapters, read by diffusers' own loaders into tiny random models."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import loaders
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dynlora.cli.main import main
from tests.adapters import randomised

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in", "time_emb_proj", "net.0.proj", "conv_shortcut"]


def unet(**settings):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "cross_attention_dim": 8, "attention_head_dim": 4}
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    more = {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1}
    return diffusers.UNet2DConditionModel(**sizes | kinds | more | settings).eval()


def sdxl():
    return unet(
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip


def sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=8, out_channels=4,
    ).eval()  # fmt: skip


def clip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=32, num_hidden_layers=2, **sizes)).eval()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model):
    """Return what a model makes of fixed inputs."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    time = torch.tensor([3.0])
    match type(base).__name__:
        case "CLIPTextModel":
            return model(torch.arange(8)[None])[0]
        case "UNet2DConditionModel":
            more = {"text_embeds": noise(1, 8), "time_ids": torch.ones(1, 6)}
            return model(noise(1, 4, 8, 8), time, noise(1, 5, 8), added_cond_kwargs=more)[0]
        case "SD3Transformer2DModel":
            return model(noise(1, 4, 8, 8), noise(1, 5, 16), noise(1, 8), time)[0]
    more = {"img_ids": torch.ones(16, 3), "txt_ids": torch.zeros(5, 3)}
    states = {"hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 5, 16)}
    return model(**states, pooled_projections=noise(1, 8), timestep=time, **more)[0]


MODELS = {
    "SD 1.5": (unet, "unet", "StableDiffusion"),
    "SDXL": (sdxl, "unet", "StableDiffusionXL"),
    "SD 3": (sd3, "transformer", "SD3"),
    "Flux": (flux, "transformer", "Flux"),
    "a text encoder": (clip, "text_encoder", "StableDiffusion"),
}
"""By name, how to make a model, its component, and the start of its pipeline's loader."""


@pytest.fixture
def adapter(tmp_path):
    """Return a function that saves a model with an adapter of unequal ranks and alphas."""

    def save(name, *more, **settings):
        make, component, _ = MODELS[name]
        make().save_pretrained(tmp_path / "base" / component)
        q, up = ("q_proj", "fc1") if name == "a text encoder" else ("to_q", "net.0.proj")
        patterns = {"lora_alpha": 6, "rank_pattern": {q: 2}, "alpha_pattern": {q: 5, up: 2}}
        config = LoraConfig(
            r=4, target_modules=[*TARGETS, "q_proj", "out_proj", "fc1", *more],
            **patterns | settings,
        )  # fmt: skip
        model = randomised(get_peft_model(make(), config), scale=0.3)
        model.save_pretrained(tmp_path / "peft")
        assert not torch.allclose(outputs(model), outputs(make()), atol=1e-3)
        return model

    return save


def export(given, made, form, *options):
    words = ["export", given, "--format", form, "--output", made, *options]
    assert main([str(word) for word in words]) == 0
    return made


def read(name, path):
    """Return a fresh model with the adapter that diffusers' loader reads from a file."""
    make, component, start = MODELS[name]
    loader, model = getattr(loaders, f"{start}LoraLoaderMixin"), make()
    more = {"SDXL": {"unet_config": SimpleNamespace(layers_per_block=2)}}
    more |= {"Flux": {"return_alphas": True}}
    tensors, *alphas, metadata = loader.lora_state_dict(
        str(path), return_lora_metadata=True, **more.get(name, {})
    )
    given = {"network_alphas": alphas[0]} if alphas else {}
    load = getattr(loader, f"load_lora_into_{component}")
    load(tensors, **given, **{component: model}, metadata=metadata)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_reads_its_format_as_peft_reads_the_folder(name, adapter, tmp_path):
    model = adapter(name)
    options = ("--component", MODELS[name][1])
    path = export(tmp_path / "peft", tmp_path / "made.safetensors", "diffusers", *options)
    assert torch.equal(outputs(read(name, path)), outputs(model))


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "a text encoder"])
def test_diffusers_reads_kohyas_format_as_peft_reads_the_folder(name, adapter, tmp_path):
    """diffusers does not apply unequal alphas of kohya's to attention layers."""
    model = adapter(name, alpha_pattern={})
    options = ("--component", MODELS[name][1])
    path = export(tmp_path / "peft", tmp_path / "made.safetensors", "kohya", *options)
    assert torch.equal(outputs(read(name, path)), outputs(model))


@pytest.mark.parametrize("name", MODELS)
def test_kohyas_names_are_resolved_by_the_base_model(name, adapter, tmp_path):
    model = adapter(name)
    options = ("--component", MODELS[name][1])
    path = export(tmp_path / "peft", tmp_path / "made.safetensors", "kohya", *options)
    made = export(path, tmp_path / "made", "native", "--model", tmp_path / "base")
    loaded = PeftModel.from_pretrained(MODELS[name][0](), made).eval()
    assert torch.equal(outputs(loaded), outputs(model))


def original_name(module):
    """Return the name in SDXL's original UNet of a module of diffusers', with underscores.

    The order is that of the map in sd-scripts.
    """
    names = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    for two in range(2):
        names[f"time_embedding.linear_{two + 1}"] = f"time_embed.{2 * two}"
        names[f"add_embedding.linear_{two + 1}"] = f"label_emb.0.{2 * two}"
        names[f"mid_block.resnets.{two}"] = f"middle_block.{2 * two}"
    for block in range(3):
        for layer in range(3):
            for index, kind in enumerate(("resnets", "attentions")):
                up, down = 3 * block + layer, 3 * block + layer + 1
                names[f"up_blocks.{block}.{kind}.{layer}"] = f"output_blocks.{up}.{index}"
                names[f"down_blocks.{block}.{kind}.{layer}"] = f"input_blocks.{down}.{index}"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{3 * block + 3}.0.op"
        names[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{3 * block + 2}.2"
    parts = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    start = next(name for name in names if f"{module}.".startswith(f"{name}."))
    rest = module.removeprefix(start).removeprefix(".")
    rest = parts.get(rest, rest) if "resnets" in start else rest
    return f"{names[start]}.{rest}".rstrip(".").replace(".", "_")


@pytest.mark.parametrize("wide", [False, True])
def test_names_of_sdxls_original_unet_are_resolved(wide, adapter, tmp_path):
    more = ["conv2", "conv", "conv_in", "conv_out", "linear_1", "linear_2"] if wide else []
    model = adapter("SDXL", *more, **({} if wide else {"alpha_pattern": {}}))
    path = export(tmp_path / "peft", tmp_path / "0.safetensors", "kohya", "--component", "unet")
    tensors = load_file(path)
    for module, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            for end in ("lora_down.weight", "lora_up.weight", "alpha"):
                tensor = tensors.pop(f"lora_unet_{module.replace('.', '_')}.{end}")
                tensors[f"lora_unet_{original_name(module)}.{end}"] = tensor
    save_file(tensors, path)
    if not wide:  # diffusers resolves fewer names
        assert torch.equal(outputs(read("SDXL", path)), outputs(model))
    made = export(path, tmp_path / "made", "native", "--model", tmp_path / "base")
    loaded = PeftModel.from_pretrained(sdxl(), made).eval()
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("metadata", [True, False])
def test_a_file_that_diffusers_saves_is_converted_by_component(metadata, adapter, tmp_path):
    """Without metadata, diffusers sets alpha to the rank, so the adapter has to be so."""
    layers, configs, models = {}, {}, {}
    for name in ("SD 1.5", "a text encoder"):
        make, component, _ = MODELS[name]
        scales = {} if metadata else {"lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}
        models[name] = adapter(name, **scales)
        found = get_peft_model_state_dict(models[name])
        found = {key.removeprefix("base_model.model."): value for key, value in found.items()}
        layers[component] = (
            found if metadata else diffusers.utils.convert_state_dict_to_diffusers(found)
        )
        configs[component] = models[name].peft_config["default"].to_dict()
    loaders.StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"] if metadata else None,
        text_encoder_lora_adapter_metadata=configs["text_encoder"] if metadata else None,
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    kohya = export(path, tmp_path / "kohya.safetensors", "kohya")
    for name, model in models.items():
        make, component, _ = MODELS[name]
        made = export(path, tmp_path / component, "native", "--component", component)
        loaded = PeftModel.from_pretrained(make(), made).eval()
        assert torch.equal(outputs(loaded), outputs(model))
        back = export(
            kohya, tmp_path / f"{component}.safetensors", "diffusers", "--model", tmp_path / "base"
        )
        assert torch.equal(outputs(read(name, back)), outputs(model))
