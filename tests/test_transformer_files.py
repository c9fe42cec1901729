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
from safetensors.torch import save_file
from tiny import VAE_TINY, edit_tensors, relative_error
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from cutdiff.checkpoint import save_folder
from cutdiff.checkpoint.keys import vae_keys
from cutdiff.checkpoint.kinds import networks_of
from cutdiff.checkpoint.load import load
from cutdiff.checkpoint.model import Model
from cutdiff.checkpoint.random_model import randomise
from cutdiff.checkpoint.transformers import BLOCKS, CLIP_G, CLIP_L, MODULES, T5XXL
from cutdiff.models.flux import Flux, FluxConfig
from cutdiff.models.joint_text import FluxText, SD3Text
from cutdiff.models.sd3 import SD3, SD3Config
from cutdiff.models.vae import VAE
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
    """What the file lacks is the folder's; what it has is not: there it has other weights."""
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
