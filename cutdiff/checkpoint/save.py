"""Writing a model as a diffusers folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cutdiff.checkpoint import text as clip
from cutdiff.checkpoint.configs import unet_to_diffusers, vae_to_diffusers
from cutdiff.checkpoint.fields import DIFFUSERS_VERSION
from cutdiff.checkpoint.folder import PREFERRED
from cutdiff.checkpoint.schedulers import noise_to_diffusers
from cutdiff.models.unet import UNet
from cutdiff.models.vae import VAE
from cutdiff.sampling.edm import AnyNoise
from cutdiff.settings import check_preferred

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cutdiff.models.text import TextEncoders

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def save_folder(
    folder: str | Path,
    *,
    unet: UNet,
    vae: VAE,
    text: TextEncoders,
    noise: AnyNoise,
    zeros_for_empty_negative: bool,
    dtype: torch.dtype = torch.float16,
    preferred: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a model, with its weights in `dtype`, so that `load` and diffusers' pipeline of its family can read it.

    `preferred` are options of a run, of `settings.PREFERENCES`, that `generate` and the command lines then take where
    nobody says otherwise.

    Every file appears whole or not at all, and replaces one of the same name. Raises ValueError for a weight that is
    not finite in `dtype` or has 8 bits, a U-Net or a layer of text states that the layout cannot express, or a
    tokenizer with tokens beside its vocabulary.
    """
    folder = Path(folder)
    check_preferred(preferred)
    unet_fields = unet_to_diffusers(unet.config)
    layer = len(text.encoders)
    if text.layer != layer:
        raise ValueError(f"text.layer={text.layer} cannot be saved: the folder's pipeline reads {layer} from the end")
    vae_fields = vae_to_diffusers(vae.config, sample_size=unet.config.native_size * vae.config.factor)
    scheduler_fields = noise_to_diffusers(noise)
    task = "Inpaint" if unet.config.inpaints else ""
    index = {
        "_class_name": f"StableDiffusion{task}Pipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler_fields["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    if text.text_encoder_2 is None:
        index |= {"requires_safety_checker": False, "safety_checker": [None, None], "feature_extractor": [None, None]}
    else:
        index |= {
            "_class_name": f"StableDiffusionXL{task}Pipeline",
            "add_watermarker": False,
            "force_zeros_for_empty_prompt": zeros_for_empty_negative,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    _write_network(folder / "unet", "diffusion_pytorch_model", unet.state_dict(), unet_fields, dtype)
    _write_network(folder / "vae", "diffusion_pytorch_model", vae.state_dict(), vae_fields, dtype)
    for suffix, encoder, tokenizer in zip(("", "_2"), text.encoders, text.tokenizers, strict=False):
        tensors = clip.with_prefix(encoder.state_dict())
        _write_network(folder / f"text_encoder{suffix}", "model", tensors, _clip_fields(encoder), dtype)
        _write_tokenizer(folder / f"tokenizer{suffix}", tokenizer)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_fields)
    if preferred:
        _write_json(folder / PREFERRED, preferred)
    _write_json(folder / "model_index.json", index)


def _write_network(
    folder: Path, stem: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], dtype: torch.dtype
) -> None:
    write_network(folder / f"{stem}.safetensors", folder / "config.json", tensors, fields, dtype)


def write_network(
    path: Path, config: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Write the weights of a network to `path`, in `dtype`, and the fields of its configuration to `config`."""
    name = path.parent.name
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize < 2:
            raise ValueError(f"{name}: {key} is quantized, {tensor.dtype}: save the model loaded without fp8")
    converted = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    for key, tensor in converted.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: {key} is not finite in {dtype}: save with dtype=torch.float32")
    _write(path, lambda part: save_file(converted, part, metadata={"format": "pt"}))
    _write_json(config, fields)


def _clip_fields(encoder: PreTrainedModel) -> dict[str, Any]:
    """The config.json of a text encoder; its dtype is that in which diffusers opens the other networks by default."""
    fields = {name: getattr(encoder.config, name) for name in clip.CONFIG_FIELDS}
    return {"architectures": [type(encoder).__name__], "model_type": "clip_text_model", "dtype": "float32", **fields}


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder.name} is a {type(tokenizer).__name__}: pass a CLIPTokenizer, which can be saved")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    beside = sorted({*tokenizer.get_vocab()} - {*model["vocab"]})
    if beside:
        raise ValueError(
            f"{folder.name} has tokens beside its vocabulary, {beside}: CLIP's file format cannot hold them"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = {name: str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS}
    fields = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length, **special}
    _write_json(folder / "vocab.json", model["vocab"])
    _write(folder / "merges.txt", lambda part: part.write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8"))
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", fields)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    _write(path, lambda part: part.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, and then move it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
