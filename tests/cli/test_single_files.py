"""Adapters in single files of kohya and diffusers: stock PEFT loads what they are converted to.

`tests/integration/test_diffusers.py` lets diffusers' own loaders read the files.
"""

import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dynlora.cli.main import main
from dynlora.files.plain_values import DEEPEST
from tests.adapters import CASES, assert_close, load_adapter, outputs, randomised, save_adapter
from tests.cli.test_hostile_files import Payload
from tests.jobs import missing

WEIGHTS = "adapter_model.safetensors"
ATTENTION = "lora_unet_model_layers_0_self_attn_q_proj"


def save_base(folder, case):
    """Save the base model of a case as the transformer of a pipeline."""
    (folder / "transformer").mkdir(parents=True)
    weights = {key: tensor.clone() for key, tensor in CASES[case][0]().state_dict().items()}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def export(given, made, form, *options):
    words = ["export", given, "--format", form, "--output", made, *options]
    assert main([str(word) for word in words]) == 0
    return made


@pytest.fixture
def files(tmp_path):
    """Return a function that saves the adapter of a case as a single file of a format."""

    def save(form, case="patterns", **settings):
        save_adapter(tmp_path / "peft", case, **settings)
        options = ("--component", "transformer")
        return export(tmp_path / "peft", tmp_path / f"{form}.safetensors", form, *options)

    return save


def tiny_clip():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=32, num_hidden_layers=2, **sizes)).eval()


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


WAYS = [["kohya"], ["diffusers"], ["kohya", "diffusers"], ["diffusers", "kohya"]]


@pytest.mark.parametrize("way", WAYS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_round_trip_returns_every_bit(way, dtype, tmp_path):
    model = save_adapter(tmp_path / "0", "patterns", lora_alpha=0.1).to(dtype)
    model.save_pretrained(tmp_path / "0")
    base = save_base(tmp_path / "base", "patterns")
    place = tmp_path / "0"
    for form in [*way, "native"]:
        names = ("--model", base) if form != "kohya" else ()
        whose = ("--component", "transformer") if place == tmp_path / "0" else ()
        made = tmp_path / (form if form == "native" else f"{form}.safetensors")
        place = export(place, made, form, *names, *whose)
    given, made = (load_file(folder / WEIGHTS) for folder in (tmp_path / "0", place))
    assert given.keys() == made.keys()
    for key, tensor in given.items():
        assert made[key].dtype == dtype
        assert torch.equal(made[key], tensor)
    expected = outputs(load_adapter(tmp_path / "0", "patterns"))
    assert torch.equal(outputs(load_adapter(place, "patterns")), expected)


def test_kohya_gets_its_names_alphas_and_dimensions(files, tmp_path):
    path = files("kohya", lora_alpha=8)
    model = load_adapter(tmp_path / "peft", "patterns").base_model.model
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_alpha")}
    tensors = load_file(path)
    for name, layer in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        assert torch.equal(tensors.pop(f"{key}.lora_down.weight"), layer.lora_A["default"].weight)
        assert torch.equal(tensors.pop(f"{key}.lora_up.weight"), layer.lora_B["default"].weight)
        assert tensors.pop(f"{key}.alpha") == layer.lora_alpha["default"]
    assert tensors == {}
    assert metadata_of(path) == {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}


def test_rslora_becomes_an_alpha_of_kohya(files, tmp_path):
    path, base = files("kohya", "rslora"), save_base(tmp_path / "base", "rslora")
    made = export(path, tmp_path / "made", "native", "--model", base)
    expected = outputs(load_adapter(tmp_path / "peft", "rslora"))
    assert_close(outputs(load_adapter(made, "rslora")), expected)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_cut_file_keeps_its_format_and_is_cut_as_its_folder(form, files, tmp_path, said):
    path = files(form)
    save_file(load_file(path), path, metadata_of(path) | {"ss_tag": "cat", "sshs_model_hash": "0"})
    cut = {}
    for name, given in (("made.safetensors", path), ("made", tmp_path / "peft")):
        cut[name] = said("resize", given, "--budget", "40%", "--output", tmp_path / name)
    same = "budget", "parameters", "energy_kept"
    assert [cut["made"][key] for key in same] == [cut["made.safetensors"][key] for key in same]
    assert load_file(tmp_path / "made.safetensors").keys() == load_file(path).keys()
    metadata = metadata_of(tmp_path / "made.safetensors")
    assert metadata["ss_tag"] == "cat"
    assert "sshs_model_hash" not in metadata
    base = save_base(tmp_path / "base", "patterns")
    made = export(tmp_path / "made.safetensors", tmp_path / "native", "native", "--model", base)
    expected = outputs(load_adapter(tmp_path / "made", "patterns"))
    assert torch.equal(outputs(load_adapter(made, "patterns")), expected)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", [(), ("--method", "ties", "--rank", 3)], ids=["sum", "ties"])
def test_files_combine_as_their_folders(form, method, tmp_path, said):
    given = {"made": [], "made.safetensors": []}
    for number, kind in enumerate(("patterns", "rslora")):
        torch.manual_seed(number)
        folder = tmp_path / str(number)
        save_adapter(folder, kind)
        options = ("--component", "transformer")
        given["made"].append(folder)
        file = export(folder, tmp_path / f"{number}.safetensors", form, *options)
        given["made.safetensors"].append(file)
    for name, places in given.items():
        said("combine", *places, *method, "--weights", "0.7,0.3", "--output", tmp_path / name)
    base = save_base(tmp_path / "base", "patterns")
    made = export(tmp_path / "made.safetensors", tmp_path / "native", "native", "--model", base)
    expected = outputs(load_adapter(tmp_path / "made", "patterns"))
    assert torch.equal(outputs(load_adapter(made, "patterns")), expected)


def test_the_figures_of_a_file_are_those_of_its_folder(files, tmp_path, said):
    path = files("kohya")
    uniform = export(path, tmp_path / "uniform.safetensors", "uniform", "--rank", 9)
    assert metadata_of(uniform) == {"ss_network_dim": "9", "ss_network_alpha": "9"}
    figures = [said("inspect", place)["layers"] for place in (tmp_path / "peft", path, uniform)]
    for folder, single, padded in zip(*figures, strict=True):
        assert single == folder | {"name": f"lora_unet_{folder['name'].replace('.', '_')}"}
        assert padded["rank"] == 9
        assert padded["norm"] == pytest.approx(folder["norm"], rel=1e-6)


@pytest.mark.parametrize("alphas", [False, True])
def test_older_names_of_diffusers_are_kept_and_nothing_declared_means_a_scaling_of_1(
    alphas, files, tmp_path, said
):
    path = files("diffusers", "plain", lora_alpha=4)
    tensors = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for key, tensor in load_file(path).items()
    }
    if alphas:
        downs = [key for key in tensors if "lora.down" in key]
        tensors |= {key.replace("lora.down.weight", "alpha"): torch.tensor(8.0) for key in downs}
    save_file(tensors, path)
    given = said("inspect", tmp_path / "peft")["layers"]
    for layer, expected in zip(said("inspect", path)["layers"], given, strict=True):
        assert layer["norm"] == pytest.approx((2 if alphas else 1) * expected["norm"], rel=1e-6)
    made = tmp_path / "made.safetensors"
    said("resize", path, "--budget", "50%", "--output", made)
    assert load_file(made).keys() == tensors.keys()
    assert ("lora_adapter_metadata" in metadata_of(made)) != alphas


@pytest.mark.parametrize("older", [False, True])
def test_a_text_encoder_has_the_names_of_its_files_and_comes_back(older, tmp_path):
    encoder = tiny_clip()
    (tmp_path / "base" / "text_encoder").mkdir(parents=True)
    start = "text_model." if older else ""  # transformers 4 and 5
    weights = {f"{start}{key}": tensor for key, tensor in encoder.state_dict().items()}
    save_file(weights, tmp_path / "base" / "text_encoder" / "model.safetensors")
    config = LoraConfig(target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 3})
    model = randomised(get_peft_model(encoder, config))
    model.save_pretrained(tmp_path / "peft")
    options = ("--component", "text_encoder")
    path = export(tmp_path / "peft", tmp_path / "made.safetensors", "kohya", *options)
    starts = {key.partition("_layers_")[0] for key in load_file(path)}
    assert starts == {"lora_te_text_model_encoder"}
    made = export(path, tmp_path / "made", "native", "--model", tmp_path / "base")
    ids = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(tiny_clip(), made).eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], model(ids)[0])


def change(rename=None, **tensors):
    """Return a function that changes names, or adds tensors, in a file."""

    def spoil(path):
        found = {(rename or str)(key): tensor for key, tensor in load_file(path).items()}
        found |= {f"{ATTENTION}.{key.replace('__', '.')}": value for key, value in tensors.items()}
        save_file({key: tensor for key, tensor in found.items() if key}, path, metadata_of(path))

    return spoil


def declare(text):
    """Return a function that changes diffusers' metadata."""
    return lambda path: save_file(load_file(path), path, {"lora_adapter_metadata": text})


def configured(**values):
    return declare(json.dumps({f"transformer.{key}": value for key, value in values.items()}))


NAN = torch.tensor(torch.nan)
BROKEN = {
    "cut short": ("kohya", lambda p: p.write_bytes(p.read_bytes()[:999]), "whole safetensors file"),
    "half": ("kohya", change(lambda k: k if "q_proj.lora_up" not in k else ""), "q_proj' | lora_B"),
    "empty": ("kohya", lambda p: p.write_bytes(b""), "whole safetensors file | 0 bytes"),
    "DoRA": ("kohya", change(dora_scale=torch.ones(2)), f"{ATTENTION}.dora_scale of DoRA"),
    "LoHa": ("kohya", change(hada_w1_a=torch.ones(2)), "hada_w1_a of LoHa"),
    "LoKr": ("kohya", change(lokr_w1=torch.ones(2)), "lokr_w1 of LoKr"),
    "Tucker": ("kohya", change(lora_mid__weight=torch.ones(2)), "lora_mid.weight of a factorized"),
    "more": ("kohya", change(other=torch.ones(2)), "nothing else | other"),
    "no LoRA": ("kohya", change(lambda key: f"{key}.x"), "nothing else"),
    "alphas": ("kohya", change(alpha=torch.ones(2)), f"{ATTENTION}.alpha | got (2,)"),
    "no number": ("kohya", change(alpha=torch.tensor(True)), f"{ATTENTION}.alpha | got True"),
    "no end": ("kohya", change(alpha=NAN), f"finite | {ATTENTION}.alpha"),
    "no json": ("diffusers", declare("{"), "`lora_adapter_metadata` | must be JSON"),
    "no object": ("diffusers", declare("[]"), "a list"),
    "too deep": ("diffusers", declare("[" * 9999), f"{DEEPEST} levels"),
    "another method": ("diffusers", configured(peft_type="LOHA"), "`peft_type` | 'LOHA'"),
    "no rank": ("diffusers", configured(peft_type="LORA"), "`r` | got None"),
    "no match": (
        "diffusers", configured(peft_type="LORA", r=5, lora_alpha=1), "down_proj | rank | 5"
    ),
    "no pattern": (
        "diffusers",
        configured(peft_type="LORA", r=4, lora_alpha=1, rank_pattern={"(.|.)*[^a-z]": 4}),
        "`rank_pattern` | 0.05 s",
    ),
}  # fmt: skip
"""By name, a format, a function that breaks a file of it, and parts of the error."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(name, files, refused):
    form, spoil, told = BROKEN[name]
    path = files(form)
    spoil(path)
    line = refused("inspect", path)
    assert len(line) < 2000
    assert str(path) in line
    assert missing(line, told) == []


def test_the_weights_of_a_folder_are_refused_because_their_scale_is_beside_them(tmp_path, refused):
    folder = tmp_path / "run"
    save_adapter(folder, "plain", lora_alpha=32)
    line = refused("inspect", folder / WEIGHTS)
    told = f"single file | {folder / WEIGHTS} | adapter_config.json | Give the folder {folder}."
    assert missing(line, told) == []


def other_base(folder, case):
    """Save a base model with a name for each of two layers that kohya does not tell apart."""
    save_base(folder, case)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    twin = {name.replace("self_attn", "self.attn"): torch.ones(1)}
    save_file(load_file(path) | twin, path)


UNCONVERTED = {
    "no base": ("kohya", "native", [], "lora_unet_model_layers_0_mlp_down_proj | `--model`"),
    "no pipeline": ("kohya", "native", ["--model", "peft"], "pipeline | unet or transformer"),
    "two names": ("kohya", "native", ["--model", "twin"], f"{ATTENTION}, which means 2"),
    "another base": ("kohya", "diffusers", ["--model", "other"], "which means 0"),
    "a broken base": ("kohya", "native", ["--model", "broken"], "whole safetensors file"),
    "a component": ("kohya", "native", ["--model", "base", "--component", "unet"],
                    "`--component` | transformer | got unet"),
    "no component": ("peft", "kohya", [], "`--component` | unet or transformer | got none"),
    "an embedding": ("embedding", "diffusers", [], "embed_tokens | Keep the PEFT folder"),
    "a head": ("head kept", "kohya", [], "lm_head"),
    "a bias": ("bias", "kohya", [], "lora_B.bias"),
    "merged": ("diffusers", "merged", [], "PEFT folder | file of diffusers"),
}  # fmt: skip
"""By name, what to convert to which format, options, and parts of the error."""


@pytest.mark.parametrize("name", UNCONVERTED)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*lora_B.bias")
def test_an_adapter_that_a_format_cannot_hold_is_refused_by_name(name, files, tmp_path, refused):
    kind, form, options, told = UNCONVERTED[name]
    if kind in CASES:
        save_adapter(tmp_path / "peft", kind)
        given, options = tmp_path / "peft", ["--component", "transformer"]
    else:
        given = files("kohya" if kind == "peft" else kind)
        given = tmp_path / "peft" if kind == "peft" else given
    save_base(tmp_path / "base", "patterns")
    save_base(tmp_path / "other", "convolutions")
    other_base(tmp_path / "twin", "patterns")
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    (tmp_path / "broken" / "unet" / "x.safetensors").write_bytes(b"x" * 99)
    options = [tmp_path / word if (tmp_path / word).is_dir() else word for word in options]
    single = "" if form in ("native", "merged") else ".safetensors"
    line = refused(
        "export", given, "--format", form, "--output", tmp_path / f"made{single}", *options
    )
    assert missing(line, told) == []


def test_the_output_of_a_file_is_a_new_file(files, tmp_path, refused):
    path = files("kohya")
    for verb in (["resize", "--budget", "50%"], ["export", "--format", "uniform"]):
        for output, told in (
            ("made", "end in .safetensors"),
            ("kohya.safetensors", "which exists"),
        ):
            line = refused(verb[0], path, *verb[1:], "--output", tmp_path / output)
            assert told in line
    options = ("--data", tmp_path / "x.csv", "--text", "x", "--output", tmp_path / "m.safetensors")
    (tmp_path / "x.csv").write_text("x\na\n")
    assert "PEFT folder" in refused("resize", path, "--budget", "50%", *options)


@pytest.mark.parametrize("place", ["kohya.safetensors", "base/transformer/x.safetensors"])
def test_a_file_runs_no_code(place, files, tmp_path, refused):
    path, base = files("kohya"), save_base(tmp_path / "base", "patterns")
    marker = tmp_path / "code was run"
    (tmp_path / place).write_bytes(pickle.dumps(Payload(marker), protocol=2))
    verbs = [["export", path, "--format", "native", "--model", base, "--output", tmp_path / "made"]]
    if place == path.name:
        output = ["--output", tmp_path / "made.safetensors"]
        verbs += [["inspect", path], ["resize", path, "--budget", "50%", *output]]
    for verb in verbs:
        assert place in refused(*verb)
        assert not marker.exists()
