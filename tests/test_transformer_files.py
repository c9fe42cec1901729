"""Models with a transformer on disk: folders that diffusers reads too, and single files in every layout."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from diffusers.loaders import single_file_utils
from PIL import Image
from refusal import CommandLine
from safetensors.torch import save_file
from tiny import VAE_TINY, edit_json, edit_tensors, relative_error
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel, T5TokenizerFast

from cutdiff.checkpoint import save_folder
from cutdiff.checkpoint.folder import PREFERRED
from cutdiff.checkpoint.keys import vae_keys
from cutdiff.checkpoint.kinds import FLUX, networks_of
from cutdiff.checkpoint.kinds import SD3 as SD3_KIND
from cutdiff.checkpoint.load import load, load_outline
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import randomise
from cutdiff.checkpoint.t5 import read_t5_tokenizer
from cutdiff.checkpoint.transformers import BLOCKS, CLIP_G, CLIP_L, MODULES, T5XXL, infer, kind_in, split
from cutdiff.models.flux import Flux, FluxConfig
from cutdiff.models.joint_text import T5, FluxText, SD3Text
from cutdiff.models.sd3 import SD3, SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Config
from cutdiff.models.vae import VAE
from cutdiff.sample import main
from cutdiff.sampling.flow import FlowConfig
from cutdiff.scenes.vocabulary import make_flow_text, make_text_encoders

PROMPT, NEGATIVE = "part of a red house with hills over a lake", "a blue tree"
FLUX_TINY = FluxConfig(
    latent_channels=4,
    num_layers=2,
    num_single_layers=3,
    num_heads=3,
    axes=(4, 6, 8),
    context_dim=64,
    pooled_dim=64,
    reads_guidance=True,
    native_size=16,
)
SD3_TINY = SD3Config(
    latent_channels=4,
    num_layers=3,
    num_heads=2,
    head_dim=16,
    context_dim=144,
    pooled_dim=128,
    native_size=16,
    table_size=12,
    dual_layers=(0, 1),
    qk_norm=True,
)
NOISES = {
    FluxConfig: FlowConfig(use_dynamic_shifting=True),
    SD3Config: FlowConfig(shift=3.0, timestep_spacing="linspace"),
}
CONFIGS = (FLUX_TINY, replace(FLUX_TINY, reads_guidance=False), SD3_TINY)


def random_text(config: FluxConfig | SD3Config) -> FluxText | SD3Text:
    text, both = make_flow_text(), make_text_encoders()
    if isinstance(config, SD3Config):
        t5_config = text.t5.encoder.config
        t5_config.d_model = config.context_dim
        text = SD3Text(
            tokenizer=both.tokenizer,
            tokenizer_2=both.tokenizer_2,
            text_encoder=CLIPTextModelWithProjection(both.text_encoder.config),
            text_encoder_2=both.text_encoder_2,
            t5=replace(text.t5, encoder=T5EncoderModel(t5_config)),
        )
    for encoder in text.encoders:
        randomise(encoder, 3)
    return text


def write(folder: Path, config: FluxConfig | SD3Config, text: FluxText | SD3Text | None = None) -> Path:
    """A random model with a transformer in a folder."""
    network = Flux(config) if isinstance(config, FluxConfig) else SD3(config)
    vae = VAE(replace(VAE_TINY, shift_factor=0.1, quant_conv=False, scaling_factor=0.5))
    randomise(network, 1)
    randomise(vae, 2)
    save_folder(
        folder,
        unet=network,
        vae=vae,
        text=text or random_text(config),
        noise=NOISES[type(config)],
        zeros_for_empty_negative=False,
        dtype=torch.float32,
    )
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    return {config: write(tmp_path_factory.mktemp("model"), config) for config in CONFIGS}


@pytest.fixture(params=CONFIGS, ids=["FLUX.1-dev", "FLUX.1-schnell", "SD3"])
def folder(request: pytest.FixtureRequest, folders: dict[Any, Path]) -> Path:
    return folders[request.param]


def tensors_of(model: Model) -> dict[str, dict[str, Tensor]]:
    return {
        name: dict(network.state_dict())
        for name, network in networks_of(model.unet, model.vae, model.text.encoders).items()
    }


def assert_same(ours: Model, theirs: Model) -> None:
    assert ours.unet.config == theirs.unet.config
    assert ours.vae.config == theirs.vae.config
    assert (ours.noise, ours.text.length(PROMPT)) == (theirs.noise, theirs.text.length(PROMPT))
    expected = tensors_of(theirs)
    for name, tensors in tensors_of(ours).items():
        assert tensors.keys() == expected[name].keys()
        assert not [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[name][key])]


def pipeline(folder: Path, **beside: Any) -> Any:
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = {"FluxPipeline": FluxPipeline, "StableDiffusion3Pipeline": StableDiffusion3Pipeline}[kind]
    return pipe.from_pretrained(folder, **beside)


@torch.no_grad()
def test_a_folder_is_read_as_diffusers_reads_it(folder: Path) -> None:
    model, pipe = load(folder), pipeline(folder)
    states = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, states[key]) for key, tensor in model.unet.state_dict().items())
    assert model.noise.described()["flow"] == {
        **model.noise.described()["flow"],
        **{name: pipe.scheduler.config[name] for name in ("shift", "use_dynamic_shifting", "max_shift")},
    }
    length = model.text.t5.length
    context, *rest = pipe.encode_prompt(
        PROMPT, None, *([None] if isinstance(model.text, SD3Text) else []), max_sequence_length=length
    )
    pooled = rest[1] if isinstance(model.text, SD3Text) else rest[0]
    ours = model.text.encode([PROMPT])
    assert relative_error(ours.context, context) < 1e-5
    assert relative_error(ours.pooled, pooled) < 1e-5
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = pipe.vae.decode(
        latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor, return_dict=False
    )[0]
    assert relative_error(model.vae.decode(latents), theirs) < 1e-5


SD3_ONLY, FLUX_ONLY = ("context_", "x_", "t_", "y_"), ("img_", "txt_", "time_", "vector_", "guidance_")


def original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's weights as its authors' code names and joins them."""
    is_sd3 = "pos_embed.pos_embed" in tensors
    written = {"pos_embed": tensors["pos_embed.pos_embed"]} if is_sd3 else {}
    modules = {
        ours: theirs for theirs, ours in MODULES.items() if not theirs.startswith(FLUX_ONLY if is_sd3 else SD3_ONLY)
    }
    last = max(int(key.split(".")[1]) for key in tensors if key.startswith("transformer_blocks."))
    for theirs in ("joint_blocks",) if is_sd3 else ("double_blocks", "single_blocks"):
        name, own = BLOCKS[theirs]
        for number in {key.split(".")[1] for key in tensors if key.startswith(f"{name}.")}:
            for module, parts in own.items():
                modules[tuple(f"{name}.{number}.{part}" for part in parts)] = f"{theirs}.{number}.{module}"
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear" if is_sd3 else "")
    left = {*tensors} - {"pos_embed.pos_embed"}
    for parts, module in modules.items():
        for kind in ("weight", "bias"):
            keys = [f"{part}.{kind}" for part in parts]
            if {*keys} <= left:
                left -= {*keys}
                joined = torch.cat([tensors[key] for key in keys])
                joined = torch.cat(joined.chunk(2)[::-1]) if parts[0] in swapped else joined
                written[f"{module}.{'scale' if '.norm.' in module else kind}"] = joined
    assert not left
    return {key: tensor.contiguous() for key, tensor in written.items()}


def test_the_original_layout_is_what_diffusers_converts(folder: Path) -> None:
    """The files below are made by `original`, which the published conversion undoes."""
    tensors = load(folder).unet.state_dict()
    is_sd3 = "pos_embed.pos_embed" in tensors
    name = f"convert_{'sd3' if is_sd3 else 'flux'}_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name)).replace("3072", str(FLUX_TINY.dim))
    namespace = dict(vars(single_file_utils))
    exec(source, namespace)  # the published function is for the full width alone
    converted = namespace[name](original(tensors))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(tensor, converted[key]) for key, tensor in tensors.items())


FULL = [FluxConfig(), FluxConfig(reads_guidance=False), SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE]


@pytest.mark.parametrize("full", FULL, ids=["dev", "schnell", "SD3-medium", "SD3.5-medium", "SD3.5-large"])
def test_full_files_are_recognised_and_inferred(full: FluxConfig | SD3Config) -> None:
    like = FluxConfig(num_layers=1, num_heads=2) if isinstance(full, FluxConfig) else replace(SD3_MEDIUM, num_layers=1)
    with torch.device("meta"):
        tensors = (Flux(full) if isinstance(full, FluxConfig) else SD3(full)).state_dict()
    for file, prefix in ((tensors, ""), (original(tensors), "model.diffusion_model.")):
        named = {prefix + key: tensor for key, tensor in file.items()}
        kind = FLUX if isinstance(full, FluxConfig) else SD3_KIND
        assert kind_in(named) == (kind, prefix)
        converted = split(named, kind, prefix)["transformer"]
        assert {key: tensor.shape for key, tensor in converted.items()} == {
            key: tensor.shape for key, tensor in tensors.items()
        }
        assert infer(converted, like) == full


def whole(model: Model, prefix: str, vae: str) -> dict[str, Tensor]:
    """All weights of a model as ComfyUI writes them."""
    texts = (CLIP_L, T5XXL) if isinstance(model.text, FluxText) else (CLIP_L, CLIP_G, T5XXL)
    state, keys = model.vae.state_dict(), vae_keys(model.vae)
    parts = {
        prefix: original(model.unet.state_dict()),
        vae: {
            key: state[ours][:, :, None, None] if ".attn_1." in key and state[ours].ndim == 2 else state[ours]
            for key, ours in keys.items()
        },
        **dict(zip(texts, (encoder.state_dict() for encoder in model.text.encoders), strict=True)),
    }
    tied = "encoder.embed_tokens.weight"
    return {
        f"{start}{key}": tensor.clone() for start, part in parts.items() for key, tensor in part.items() if key != tied
    }


LAYOUTS: dict[str, Callable[[Model], dict[str, Tensor]]] = {
    "diffusers": lambda model: model.unet.state_dict(),
    "original": lambda model: original(model.unet.state_dict()),
    "ComfyUI": lambda model: {
        f"model.diffusion_model.{key}": part for key, part in original(model.unet.state_dict()).items()
    },
    "all in one": lambda model: whole(model, "model.diffusion_model.", "vae."),
    "all in one, as SD3": lambda model: whole(model, "model.diffusion_model.", "first_stage_model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_single_file_is_the_folder(folder: Path, tmp_path: Path, layout: str) -> None:
    """The folder gives what the file lacks, and nothing that it has: there it has other weights."""
    expected = load(folder)
    path, config = tmp_path / "model.safetensors", shutil.copytree(folder, tmp_path / "config")
    save_file({key: tensor.contiguous() for key, tensor in LAYOUTS[layout](expected).items()}, path)
    shutil.rmtree(config / "transformer")
    shutil.copytree(folder / "transformer", config / "transformer")
    edit_tensors(config / "transformer" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.popitem())
    if layout.startswith("all"):
        for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            for file in (config / name).glob("*.safetensors"):
                file.unlink()
    model = load(path, config=config)
    assert_same(model, expected)
    assert next(iter(model.files)) == "model.safetensors"
    assert ("vae/diffusion_pytorch_model.safetensors" in model.files) == (not layout.startswith("all"))


def test_sd3_without_t5_reads_zeros(folders: dict[Any, Path], tmp_path: Path) -> None:
    """Left out by the option, in the folder, or by diffusers, the states are the same."""
    left_out = load(folders[SD3_TINY], text_encoder_3="none")
    assert isinstance(left_out.text, SD3Text)
    assert "text_encoder_3/model.safetensors" not in left_out.files
    saved = load(write(tmp_path / "saved", SD3_TINY, left_out.text))
    assert not (tmp_path / "saved" / "text_encoder_3").exists()
    pipe = pipeline(tmp_path / "saved", text_encoder_3=None, tokenizer_3=None)
    context, _, pooled, _ = pipe.encode_prompt(PROMPT, None, None, negative_prompt="")
    for model in (left_out, saved):
        states = model.text.encode([PROMPT])
        assert relative_error(states.context, context) < 1e-5
        assert relative_error(states.pooled, pooled) < 1e-5


def test_a_prompt_of_its_own_is_t5s_in_flux_and_the_second_clips_in_sd3(folder: Path) -> None:
    text = load(folder).text
    both, second, first = text.encode([PROMPT]), text.encode([PROMPT], NEGATIVE), text.encode([NEGATIVE])
    if isinstance(text, FluxText):
        assert torch.equal(second.context, first.context)
        assert torch.equal(second.pooled, both.pooled)
    else:
        (own, other), tokens = (clip.config.hidden_size for clip in text.clips), 77
        assert torch.equal(second.context[:, :tokens, :own], both.context[:, :tokens, :own])
        other_clip = slice(own, own + other)
        assert torch.equal(second.context[:, :tokens, other_clip], first.context[:, :tokens, other_clip])
        assert torch.equal(second.context[:, tokens:], both.context[:, tokens:])


def test_weights_scale_t5s_states_and_long_prompts_are_cut(folder: Path) -> None:
    text = load(folder).text
    assert isinstance(text, FluxText | SD3Text)
    t5 = text.t5
    assert isinstance(t5, T5)
    plain, weighted = (text.encode([f"a {word} house"]).context[:, -t5.length :] for word in ("red", "(red:1.5)"))
    expected = plain.clone()
    expected[:, 1] *= 1.5
    assert torch.equal(weighted, expected)
    long = "a red house " * 40
    assert text.encode([long]).context.shape[1] == text.length(long)
    ids = t5.tokenize([long], torch.device("cpu")).ids[0]
    assert ids.tolist() == t5.tokenizer(long, max_length=t5.length, truncation=True).input_ids
    assert text.encode([long, "a"], min_length=text.length(long)).context.shape[:2] == (2, text.length(long))


def test_encoders_that_rest_on_the_cpu_encode_the_same(folder: Path) -> None:
    text = load(folder).text
    assert torch.equal(text.offloaded().encode([PROMPT]).context, text.encode([PROMPT]).context)
    assert len(text.on(torch.device("meta")).encoders) == len(text.encoders)
    assert all(encoder.device.type == "meta" for encoder in text.on(torch.device("meta")).encoders)


def test_words_stand_where_their_tokens_are(folders: dict[Any, Path]) -> None:
    words = load(folders[FLUX_TINY]).text.words("a (red:1.5) zoo")
    assert words == [("a", [0]), ("(red:1.5000)", [1]), ("zoo", [2, 3, 4, 5])]


def test_a_t5_tokenizer_is_transformers(folder: Path) -> None:
    name = "tokenizer_3" if (folder / "tokenizer_3").exists() else "tokenizer_2"
    theirs, ours = T5TokenizerFast.from_pretrained(folder / name), read_t5_tokenizer(folder / name, 512)
    for prompt in ("", PROMPT, "A Tent, 2 (pink) balloons!", "  a   tree  ", "ü"):
        assert ours(prompt).input_ids == theirs(prompt).input_ids
    assert (len(ours), ours.model_max_length) == (len(theirs), 32)


def config(part: str, **fields: object) -> Callable[[Path], object]:
    """The edit of a part's configuration."""
    names = {"tokenizer_2": "tokenizer.json", "scheduler": "scheduler_config.json"}
    return lambda path: edit_json(path / part / names.get(part, "config.json"), **fields)


def without(part: str) -> Callable[[Path], object]:
    return lambda path: shutil.rmtree(path / part)


BAD: dict[str, tuple[Any, Callable[[Path], object], str]] = {
    "no T5 in FLUX.1": (FLUX_TINY, without("text_encoder_2"), "text_encoder_2/config.json is missing"),
    "no T5 in SD3": (
        SD3_TINY,
        without("text_encoder_3"),
        "has no text_encoder_3: download it, or pass --text-encoder-3 none",
    ),
    "T5 left out of FLUX.1": (
        FLUX_TINY,
        lambda path: edit_json(path / "model_index.json", text_encoder_2=[None, None]),
        "has no text_encoder_2, which is T5 and which FLUX.1 needs: download it",
    ),
    "Kontext's pipeline": (
        FLUX_TINY,
        lambda path: edit_json(path / "model_index.json", _class_name="FluxKontextPipeline"),
        "is a FluxKontextPipeline: a FLUX.1 that is shown a picture too, as Fill, Canny, Depth and Kontext are: pass",
    ),
    "no tokenizer of T5": (FLUX_TINY, without("tokenizer_2"), "tokenizer_2 holds no tokenizer.json, which T5's"),
    "no VAE": (FLUX_TINY, without("vae"), "has no vae: pass one as --vae"),
    "no transformer": (SD3_TINY, without("transformer"), "transformer/config.json is missing"),
    "SD3's transformer in FLUX.1": (
        FLUX_TINY,
        config("transformer", _class_name="SD3Transformer2DModel"),
        "it is of SD3Transformer2DModel where FluxTransformer2DModel belongs",
    ),
    "Fill": (
        FLUX_TINY,
        config("transformer", in_channels=96, out_channels=16),
        "reads 96 channels and gives 16: a FLUX.1 that is shown a picture too",
    ),
    "bitsandbytes": (
        FLUX_TINY,
        config("transformer", quantization_config={"quant_method": "bitsandbytes"}),
        "its weights are quantized ('bitsandbytes'), which is not read: take the fp16 or bf16 model",
    ),
    "nf4": (
        FLUX_TINY,
        lambda path: edit_tensors(
            path / "transformer/diffusion_pytorch_model.safetensors",
            lambda tensors: tensors.update({"proj_out.weight.absmax": torch.ones(4)}),
        ),
        "its weights are quantized, in a format that is not read (by proj_out.weight.absmax): take its fp16 file",
    ),
    "no guidance embedding in dev": (
        replace(FLUX_TINY, reads_guidance=False),
        config("transformer", guidance_embeds=True),
        "4 missing: time_text_embed.guidance_embedder",
    ),
    "axes": (FLUX_TINY, config("transformer", axes_dims_rope=[4, 6, 6]), "attention_head_dim=18 is not supported"),
    "context": (
        FLUX_TINY,
        config("transformer", joint_attention_dim=32),
        "transformer's context width and the text encoders' differ, 32 and 64",
    ),
    "pooled": (
        SD3_TINY,
        config("transformer", pooled_projection_dim=32),
        "transformer's pooled width and the text encoders' differ, 32 and 128",
    ),
    "norm": (SD3_TINY, config("transformer", qk_norm="layer_norm"), "qk_norm='layer_norm' is not supported, only"),
    "width": (SD3_TINY, config("transformer", caption_projection_dim=9), "caption_projection_dim=9 is not supported"),
    "dual": (SD3_TINY, config("transformer", dual_attention_layers=[7]), "dual_layers=(7,) must be among the 3 blocks"),
    "T5 of a billion layers": (
        FLUX_TINY,
        config("text_encoder_2", num_layers=10**9),
        "num_layers=1000000000 must be a whole number from 1 to 1000",
    ),
    "an activation": (
        FLUX_TINY,
        config("text_encoder_2", feed_forward_proj="gated-no"),
        "feed_forward_proj='gated-no' is not",
    ),
    "noise of a U-Net": (
        FLUX_TINY,
        config("scheduler", _class_name="EulerDiscreteScheduler", use_dynamic_shifting=False),
        "scheduler_config.json: EulerDiscreteScheduler: a transformer and a scheduler without flow matching do not fit",
    ),
    "pieces": (FLUX_TINY, config("tokenizer_2", model={"vocab": {"a": 1}}), "has no list of 4 to 100000 pieces"),
    "a score": (
        FLUX_TINY,
        config("tokenizer_2", model={"vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0], ["a", "b"]]}),
        "gives 'a' the score 'b'",
    ),
    "a charsmap": (FLUX_TINY, config("tokenizer_2", normalizer={"precompiled_charsmap": "?"}), "is not T5's table of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders(name: str, folders: dict[Any, Path], tmp_path: Path, command_line: CommandLine) -> None:
    model, edit, message = BAD[name]
    copy = shutil.copytree(folders[model], tmp_path / "copy")
    edit(copy)
    command_line.refuses(["--model", copy], 1, message)


def test_bad_files_and_options(folders: dict[Any, Path], tmp_path: Path, command_line: CommandLine) -> None:
    flux, schnell, sd3 = folders.values()
    file, lora = tmp_path / "model.safetensors", tmp_path / "lora.safetensors"
    tensors = original(load(flux).unet.state_dict())
    save_file(tensors, file)

    def refuses(message: str, *arguments: object, status: int = 1) -> None:
        command_line.refuses(["--model", *arguments], status, message)

    refuses("FLUX.1 without tokenizers, which no file holds: pass --config FOLDER", file)
    refuses("its scheduler and the networks that it lacks, text_encoder, text_encoder_2, vae", file)
    refuses("its FluxTransformer2DModel does not fit the folder", file, "--config", sd3)
    refuses("its FluxTransformer2DModel does not fit the folder", file, "--config", "weights/scenes")
    refuses("its transformer reads the guidance scale, unlike", file, "--config", schnell)
    without_t5 = ("--text-encoder-3", "none")
    refuses("--text-encoder-3 none is for models of SD3", flux, *without_t5, status=2)
    refuses("--text-encoder-3 none is for models of SD3", "weights/scenes", *without_t5, status=2)
    for option, value in (("--prediction-type", "epsilon"), ("--timestep-spacing", "trailing")):
        refuses(f"{option} {value} is not for a model of flow matching", flux, option, value, status=2)
    refuses("CLIP's states, and this one reads T5's: leave it out", flux, "--clip-skip", "1", status=2)
    save_file({"emb_params": torch.ones(64)}, lora)
    refuses("is for CLIP alone, and this model reads T5 too", flux, "--embedding", lora)
    joined = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{joined}.lora_down.weight": torch.ones(2, 54), f"{joined}.lora_up.weight": torch.ones(162, 2)}, lora)
    refuses("FLUX.1 or SD3 in the original layout, with joined matrices: convert it", flux, "--lora", lora)
    save_file({"lora_unet_nothing.lora_down.weight": torch.ones(2, 2)}, lora)
    refuses("is no LoRA for this model", flux, "--lora", lora)
    refuses("is no LoRA, but may be a whole model: none of its keys", flux, "--lora", file)
    scenes = Path("weights/scenes-lcm.safetensors").resolve()
    refuses("was made for a U-Net, and this model has a transformer: use a LoRA of its", flux, "--lora", scenes)
    save_file({**tensors, "double_blocks.0.img_attn.extra": torch.ones(2)}, file)
    refuses("1 unexpected: double_blocks.0.img_attn.extra", file, "--config", flux)
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith("vector_in")}, file)
    refuses("has no time_text_embed.text_embedder.linear_1.weight", file, "--config", flux)


def test_a_lora_in_the_layout_of_diffusers(folders: dict[Any, Path], tmp_path: Path) -> None:
    module, path = "single_transformer_blocks.1.attn.to_k", tmp_path / "lora.safetensors"
    down, up = torch.randn(2, FLUX_TINY.dim), torch.randn(FLUX_TINY.dim, 2)
    save_file({f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}, path)
    plain, merged = load(folders[FLUX_TINY]), load(folders[FLUX_TINY], loras=[(path, 0.5)])
    before, after = (model.unet.state_dict() for model in (plain, merged))
    torch.testing.assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + 0.5 * up @ down)
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{module}.weight"]


def test_what_a_run_does_not_read_is_told_once(
    folders: dict[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = "a red house", "a red house " * 25 + "at night"
    of_t5, of_clip = "T5 reads the first 31 tokens of ", "CLIP reads the first 75 tokens of "
    positions = "cutdiff: --positions changed nothing: the network was shown no more than its native 64 px at once\n"
    negative = (
        "cutdiff: this model reads the guidance scale and no negative prompt, so that was not read: leave it out\n"
    )

    def told(model: Any, *arguments: str, method: str = "multidiffusion") -> str:
        how = ["--method", method, "--steps", "1", "--guidance-scale", "2", "--width", "128", "--height", "64"]
        where = ["--model", str(folders[model]), "--out", str(tmp_path), "--overwrite"]
        assert main([*arguments, *how, *where]) == 0
        return capsys.readouterr().err

    dev, schnell, sd3 = folders
    assert told(dev, short) == told(schnell, short, "--negative-prompt", short) == told(sd3, short) == ""
    assert told(dev, short, "--positions", "ntk", "--shift", "2") == positions
    text = Image.open(next(tmp_path.glob("*.png"))).text["parameters"]  # type: ignore[attr-defined]
    assert 'Shift: 2.0, Positions: "ntk,proportional=False,factor=None"' in text
    assert told(dev, short, "--positions", "ntk", method="direct") == ""
    assert told(dev, short, "--negative-prompt", short) == negative
    for model, options, count in ((schnell, ["--negative-prompt", long], 2), (schnell, ["--prompt-2", long], 1)):
        lines = told(model, short, *options).splitlines()
        assert len(lines) == count
        assert of_t5 in lines[-1]
        assert lines[-1].endswith("at night'")
        assert all(of_clip in line for line in lines[:-1])
    assert len(told(schnell, long, "--num-images", "2").splitlines()) == 2
    assert of_t5 in told(sd3, f"[a tent:{long}:0.5]").rstrip("\n")
    assert told(sd3, long, "--text-encoder-3", "none") == ""


def test_what_nobody_says_is_as_in_the_published_pipelines(folders: dict[Any, Path], tmp_path: Path) -> None:
    """Distilled to four steps is what has no guidance scale and times that are the same at every size."""
    flux, schnell, sd3 = folders.values()
    dev = {"guidance_scale": 3.5, "num_steps": 28}
    assert load(flux).preferred == dev
    assert load(sd3).preferred == {"guidance_scale": 7.0, "num_steps": 28}
    other, file = shutil.copytree(schnell, tmp_path / "other"), tmp_path / "model.safetensors"
    config("scheduler", use_dynamic_shifting=False)(other)
    distilled = {"guidance_scale": 1.0, "num_steps": 4}
    assert load(other).preferred == load_outline(other, dtype=torch.float32).preferred == distilled
    config("scheduler", use_dynamic_shifting=True)(other)
    assert load(other).preferred == dev
    save_file(original(load(other).unet.state_dict()), file)
    (other / PREFERRED).write_text('{"guidance_scale": 2}')
    for model in (load(other), load(file, config=other), load_outline(file, dtype=torch.float32, config=other)):
        assert model.preferred == {"guidance_scale": 2}
    assert load(file, config=schnell).preferred == load(schnell).preferred


def test_a_lora_of_sd35s_second_attention_is_no_unets(folders: dict[Any, Path], tmp_path: Path) -> None:
    module, path = "transformer_blocks.0.attn2.to_k", tmp_path / "lora.safetensors"
    down, up = torch.randn(2, SD3_TINY.dim), torch.randn(SD3_TINY.dim, 2)
    save_file({f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}, path)
    before, after = (load(folders[SD3_TINY], loras=loras).unet.state_dict() for loras in ([], [(path, 1.0)]))
    torch.testing.assert_close(after[f"{module}.weight"], before[f"{module}.weight"] + up @ down)


def test_names_of_the_transformer(folders: dict[Any, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders[FLUX_TINY], tmp_path / "copy")
    names = ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model")
    names = [f"{name}.safetensors" for name in (*names, "text_encoder/model", "text_encoder_2/model")]
    edit_tensors(copy / names[0], lambda tensors: tensors["proj_out.bias"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"hold NaN or infinity, transformer: proj_out\.bias: download"):
        load(copy, check_weights=True)
    edit_tensors(copy / names[3], lambda tensors: tensors["shared.weight"].fill_(torch.inf))
    assert "text_encoder_2: shared.weight" in load(copy).bad_weights()
    assert [*load(copy).hashes] == names


def test_float16_keeps_t5s_last_layers_in_float32(folder: Path) -> None:
    text = load(folder, dtype=torch.float16).text
    dtypes = {key.split(".")[-2]: tensor.dtype for key, tensor in text.encoders[-1].state_dict().items()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"wo"}
    assert text.encode([PROMPT]).context.dtype == torch.float16
