"""Random models of each family's shape, small enough to write a dozen times in a test run, in every layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cutdiff.checkpoint import save_folder
from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.families import SD21, SDXL, Family
from cutdiff.checkpoint.keys import unet_keys, vae_keys
from cutdiff.checkpoint.kinds import TEXT_ENCODERS, networks_of
from cutdiff.checkpoint.model import Model
from cutdiff.models.config import SD15_UNET, SD21_UNET, UNetConfig, VAEConfig
from cutdiff.models.text import TextEncoders
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.noise import NoiseConfig

WITHOUT_VIEWS = (
    "direct",
    "attention_scaling",
    "scalecrafter",
    "hidiffusion",
    "imax",
    "hiflow",
    "rectifiedhr",
    "frecas",
    "diffusehigh",
    "freescale",
    "spotdiffusion",
    "upscale",
)
"""The methods without overlapping views."""
LENGTH = 16
UNET = UNetConfig(
    channels=(32, 64, 64),
    layers_per_block=1,
    transformer_layers=(0, 1, 2),
    mid_transformer_layers=2,
    num_heads=(1, 1, 1),
    context_dim=192,
    pooled_dim=64,
    size_embedding_dim=8,
)
"""SDXL's layout, to be written and read."""
VAE_TINY = VAEConfig(channels=(32, 32, 64), layers_per_block=1)
QUICK_UNET = UNetConfig(
    channels=(16, 32),
    layers_per_block=1,
    transformer_layers=(0, 1),
    mid_transformer_layers=1,
    num_heads=(2, 4),
    context_dim=24,
    pooled_dim=12,
    size_embedding_dim=8,
    norm_groups=4,
    native_size=8,
)
"""SDXL's architecture at a native size of 64 px, to be run: tests that need another one change its fields."""
QUICK_VAE = VAEConfig(channels=(8, 8, 8, 16), layers_per_block=1, norm_groups=4)
SD15_TINY = replace(
    SD15_UNET, channels=(32, 64, 64, 64), layers_per_block=1, num_heads=(8, 8, 8, 8), context_dim=64, native_size=64
)
SD21_TINY = replace(SD21_UNET, channels=(64, 64, 128, 128), layers_per_block=1, num_heads=(1, 1, 2, 2), context_dim=64)
NOISE = NoiseConfig(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)


@dataclass(frozen=True)
class Tiny:
    """A random model, by default of SDXL's shape."""

    unet: UNet
    vae: VAE
    text: TextEncoders
    family: Family = SDXL

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, noise: NoiseConfig = NOISE) -> Path:
        save_folder(
            folder,
            unet=self.unet,
            vae=self.vae,
            text=self.text,
            noise=noise,
            zeros_for_empty_negative=False,
            dtype=dtype,
        )
        return folder

    def original(self) -> dict[str, Tensor]:
        """The weights as a single file of the family has them."""
        unet, vae = self.unet.state_dict(), self.vae.state_dict()
        parts = {
            "unet": {original: unet[key] for original, key in unet_keys(self.unet).items()},
            "vae": {original: as_convolution(original, vae[key]) for original, key in vae_keys(self.vae).items()},
        }
        for text, encoder in zip(self.family.texts, self.text.encoders, strict=True):
            tensors = clip.with_prefix(encoder.state_dict())
            parts[text.name] = to_open_clip(tensors) if text.is_open_clip else tensors
        prefixes = self.family.prefixes
        named = ((prefixes[name] + key, tensor) for name, part in parts.items() for key, tensor in part.items())
        return {key: tensor.contiguous() for key, tensor in named}


def as_convolution(key: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor


def to_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename transformers' tensors to OpenCLIP's names, written the other way round than the package's conversion."""
    written = {
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
    }
    if "text_projection.weight" in tensors:
        written["text_projection"] = tensors["text_projection.weight"].T
    for kind in ("weight", "bias"):
        written[f"ln_final.{kind}"] = tensors[f"text_model.final_layer_norm.{kind}"]
        for i in range(sum(key.endswith("layer_norm1.weight") for key in tensors)):
            ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            qkv = [tensors[f"{ours}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            written |= {
                f"{theirs}.attn.in_proj_{kind}": torch.cat(qkv),
                f"{theirs}.attn.out_proj.{kind}": tensors[f"{ours}.self_attn.out_proj.{kind}"],
                f"{theirs}.ln_1.{kind}": tensors[f"{ours}.layer_norm1.{kind}"],
                f"{theirs}.ln_2.{kind}": tensors[f"{ours}.layer_norm2.{kind}"],
                f"{theirs}.mlp.c_fc.{kind}": tensors[f"{ours}.mlp.fc1.{kind}"],
                f"{theirs}.mlp.c_proj.{kind}": tensors[f"{ours}.mlp.fc2.{kind}"],
            }
    return written


def tiny_tokenizer(pad_token: str) -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz!"
    tokens = ["!", *letters[:-1], *(f"{letter}</w>" for letter in letters), "re", "red</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges: Any = [("r", "e"), ("re", "d</w>")]  # pairs are what the tokenizer takes, its annotation says otherwise
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        model_max_length=LENGTH,
        pad_token=pad_token,
    )


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    vocabulary = tokenizer.get_vocab()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary[tokenizer.pad_token],
    )


def tiny_text() -> TextEncoders:
    tokenizer, tokenizer_2 = tiny_tokenizer("<|endoftext|>"), tiny_tokenizer("!")
    config = clip_config(tokenizer)
    other = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3, "hidden_act": "gelu"}
    second = CLIPTextConfig(**{**config.to_dict(), **other, "pad_token_id": tokenizer_2.pad_token_id})
    return TextEncoders(tokenizer, tokenizer_2, CLIPTextModel(config), CLIPTextModelWithProjection(second))


def random_model(family: Family) -> Tiny:
    """Make a model with weights that no initialisation gives: biases and norms are constants when they are new."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family is SDXL:
            model = Tiny(UNet(UNET), VAE(VAE_TINY), tiny_text())
        else:
            is_open_clip = family is SD21
            tokenizer = tiny_tokenizer("!" if is_open_clip else "<|endoftext|>")
            config = clip_config(tokenizer)
            config.num_hidden_layers, config.hidden_act = (3, "gelu") if is_open_clip else (2, "quick_gelu")
            text = TextEncoders(tokenizer, None, CLIPTextModel(config), None, layer=family.text_layer)
            vae = VAE(replace(VAE_TINY, scaling_factor=0.18215, force_upcast=False))
            model = Tiny(UNet(SD21_TINY if is_open_clip else SD15_TINY), vae, text, family)
        for encoder in model.text.encoders:
            for parameter in encoder.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
    for network in networks(model).values():
        network.eval().requires_grad_(False)
    return model


def with_nine(unet: UNet) -> UNet:
    """A random U-Net of the same shape that inpaints."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return UNet(replace(unet.config, in_channels=9)).eval().requires_grad_(False)


def put_in_cache(cache: Path, repository: str, folder: Path) -> None:
    """Lay a folder out as the Hugging Face cache keeps a repository."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))


def networks(model: Model | Tiny) -> dict[str, nn.Module]:
    if isinstance(model, Tiny):  # its U-Net may be that of diffusers
        return {"unet": model.unet, "vae": model.vae, **dict(zip(TEXT_ENCODERS, model.text.encoders, strict=False))}
    return networks_of(model.unet, model.vae, model.text.encoders)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over that of the second tensor."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def assert_bit_equal(a: Model | Tiny, b: Model | Tiny) -> None:
    for name, network in networks(a).items():
        ours, theirs = network.state_dict(), networks(b)[name].state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def on(device: str, model: Model) -> Model:
    """The model on the device: itself on the CPU, else a copy."""
    if device == "cpu":
        return model
    copy = deepcopy(model)
    for network in (copy.unet, copy.vae, *copy.text.encoders):
        network.to(device)
    return copy
